"""The list of papers reads citations as docstrings write them."""

import importlib
import pathlib
import sys

import pytest

DOCS = pathlib.Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))
papers = importlib.import_module("papers")


def test_the_list_names_a_paper_and_what_is_there_of_it():
    row = next(line for line in papers.table().splitlines() if line.startswith("| Frantar & Alistarh 2023"))
    assert (
        "[2301.00774](https://arxiv.org/abs/2301.00774)" in row
        and "[`jc.prune.SparseGPT`][jcompress.prune.SparseGPT]" in row
    )
    assert "<!-- papers -->" in (DOCS / "papers.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Keep it (Han et al. 2015, arXiv:1506.02626).", [("Han et al.", "2015", "1506.02626")]),
        ("as LeCun, Denker\n    & Solla 1990 do", [("LeCun, Denker & Solla", "1990", "")]),
        ("(STR; Kusupati et al. 2020, 2002.03231; below)", [("Kusupati et al.", "2020", "2002.03231")]),
        ("Cantu-Paz (2003), Fazel 2002", [("Cantu-Paz", "2003", ""), ("Fazel", "2002", "")]),
        ("by Van Loan & Pitsianis (1993)", [("Van Loan & Pitsianis", "1993", "")]),
        ("MiniLMv2's 2012.15828 and ICLR 2018", []),
    ],
)
def test_citations_are_read(text, found):
    assert list(papers.cited(text)) == found


def test_each_paper_has_names_that_are_public():
    for paper, names in papers.papers().items():
        assert names and set(names) <= set(papers.all_public_names()), paper
