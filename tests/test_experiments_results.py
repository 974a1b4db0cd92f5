"""What is measured and tracked can be drawn again: the tables are those that stand there, the pictures say all."""

import shutil
from pathlib import Path

import pytest

from experiments import results

FOLDER = Path(__file__).parent.parent / "results"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A copy of the tracked results, drawn again from its rows."""
    folder = tmp_path_factory.mktemp("results") / "results"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.png", "*.md"))
    return folder, results.draw(folder)


def test_tables_are_those_of_the_rows(drawn):
    folder, pictures = drawn
    tables = set(folder.rglob("*.md"))
    assert tables >= {picture.with_suffix(".md") for picture in pictures}
    for table in tables:
        assert table.read_text() == (FOLDER / table.relative_to(folder)).read_text(), table


def test_every_tracked_picture_is_drawn_by_the_command(drawn):
    folder, pictures = drawn
    assert {p.relative_to(folder) for p in pictures} == {p.relative_to(FOLDER) for p in FOLDER.rglob("*.png")}
