"""The README and the pages of the site run as they are written, and the site shows every public name."""

import pathlib
import re

import pytest
from test_project_files import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = [page for page in PAGES if "```python\n" in page.read_text()]
DESIGN = (
    '("encoder/.*/kernel", jc.chain(jc.factorize.SVD(rank=8), jc.quantize.Int(bits=8))),\n    (".*/kernel", ',
    "optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=1_000)",
    'jc.plan(params, [(".*/kernel", jc.prune.Magnitude(sparsity=ramp)), (".*", None)])',
    "tx = optax.chain(optax.adamw(1e-3), jc.project(prune, every=50))",
    "train, held = jc.split(small)\ndef loss(train):\n    dense = jc.materialize(jc.merge(train, held))\n",
    "return hard(logits, y) + jc.distill.soft_targets(logits, teacher_logits, temperature=4.0)",
)


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), namespace)
    assert capsys.readouterr().out


def test_the_three_loops_are_told_as_designed():
    text = (ROOT / "docs/loops.md").read_text()
    assert [line for line in DESIGN if line not in text] == []


def test_every_loop_ends_in_a_file():
    loops = re.split(r"^## ", (ROOT / "docs/loops.md").read_text(), flags=re.M)
    told = [loop for loop in loops if re.match(r"[ABC]\. ", loop)]
    assert len(told) == 3
    assert all("jc.save(" in loop for loop in told)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


# What mkdocs and its plugins warn of in their own code is not ours to mend.
@pytest.mark.filterwarnings("default")
def test_the_site_builds_and_shows_every_public_name(tmp_path, monkeypatch):
    pytest.importorskip("mkdocs_jupyter")
    pytest.importorskip("mkdocstrings_handlers.python")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert 'id="jcompress.prune.Magnitude"' in (pathlib.Path(tmp_path) / "api/prune/index.html").read_text()
