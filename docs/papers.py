"""The papers that docstrings cite, and what is there of each: printed, and in the site the page ``papers.md``.

PYTHONPATH=. python docs/papers.py
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterator

from names import all_public_names

_NAME = r"(?:(?:De|Van) )?[A-Z][\w'-]+"
CITED = re.compile(
    rf"({_NAME} et al\.|{_NAME}(?:, {_NAME})* & {_NAME}|{_NAME}) \(?((?:19|20)\d\d)\b(?!\.\d)"
    r"(?:, (?:arXiv:)?(\d{4}\.\d{4,5}))?"
)
"""Authors, a year, and where it stands behind them the number on arXiv."""
OTHERS = ("Conference", "NeurIPS")

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


def table() -> str:
    """The index in Markdown, with links to what the site shows of each name."""
    lines = ["| paper | what is there |", "| --- | --- |"]
    for (authors, year, number), names in papers().items():
        paper = f"{authors} {year}" + (f", [{number}](https://arxiv.org/abs/{number})" if number else "")
        shown = ", ".join(f"[`{name.replace('jcompress', 'jc', 1)}`][{name}]" for name in sorted(names))
        lines.append(f"| {paper} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for (authors, year, _), names in papers().items():
        sys.stdout.write(f"{authors} {year}: {', '.join(names)}\n")
