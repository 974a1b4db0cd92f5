"""Writes ``docs/papers.md``, an index of the papers that docstrings cite, and of what is there of each.

PYTHONPATH=. python docs/papers.py
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from names import all_public_names

_NAME = r"(?:(?:De|Van) )?[A-Z][\w'-]+"
CITED = re.compile(
    rf"({_NAME} et al\.|{_NAME}(?:, {_NAME})* & {_NAME}|{_NAME}) \(?((?:19|20)\d\d)\b(?!\.\d)"
    r"(?:, (?:arXiv:)?(\d{4}\.\d{4,5}))?"
)
"""Authors, a year, and where it stands behind them the number on arXiv."""
OTHERS = ("Conference", "NeurIPS")

HEAD = """# Papers

The {count} papers that docstrings cite, and what cites them: the method itself, or what it begins from. Written by
`PYTHONPATH=. python docs/papers.py`.

"""

Paper = tuple[str, str, str]


def cited(text: str) -> Iterator[Paper]:
    """The authors, the year and the number of each paper that a docstring names."""
    for authors, year, number in CITED.findall(re.sub(r"\s+", " ", text)):
        if not authors.isupper() and authors not in OTHERS:
            yield authors, year, number


@functools.cache
def papers() -> dict[Paper, list[str]]:
    """The public names by the papers that their docstrings cite, in the order of the authors."""
    found: dict[Paper, list[str]] = {}
    for name in all_public_names():
        room, _, own = name.rpartition(".")
        for paper in dict.fromkeys(cited(inspect.getdoc(getattr(importlib.import_module(room), own)) or "")):
            found.setdefault(paper, []).append(name)
    for authors, year, number in list(found):
        others = [paper for paper in found if paper[:2] == (authors, year) and paper[2]]
        if not number and len(others) == 1:  # the number stands with another name
            names = found.pop((authors, year, ""))
            found[others[0]] = list(dict.fromkeys(found[others[0]] + names))
    return dict(sorted(found.items()))


def page() -> str:
    """The page in Markdown."""
    lines = ["| paper | what is there |", "| --- | --- |"]
    for (authors, year, number), names in papers().items():
        paper = f"{authors} {year}" + (f", [{number}](https://arxiv.org/abs/{number})" if number else "")
        shown = ", ".join(f"`{name.replace('jcompress', 'jc', 1)}`" for name in sorted(names))
        lines.append(f"| {paper} | {shown} |")
    return HEAD.format(count=len(papers())) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "papers.md").write_text(page(), encoding="utf-8")
