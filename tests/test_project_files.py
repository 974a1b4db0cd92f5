"""The two commands of the README, and the layers of the package."""

import ast
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODULES = sorted((ROOT / "jcompress").rglob("*.py"))
LAYERS = {
    "version": set(),
    "numeric": set(),
    "core": {"numeric"},
    "formats": {"core", "numeric"},
    "rules": {"core"},
    "apply": {"core", "formats", "layers", "numeric", "rules"},
    "transforms": {"core", "formats", "rules"},
    "projection": {"apply", "core", "numeric", "rules", "transforms"},
    "lagrangian": {"apply", "core", "projection", "rules", "transforms"},
    "combine": {"core", "formats", "numeric"},
    "layers": {"core", "formats", "numeric", "rules"},
    "distill": {"core", "rules"},
    "nn": {"core", "rules"},
    "io": {"core", "formats", "numeric", "rules", "version"},
    "measure": {"core", "formats", "io", "numeric", "rules"},
    "trace": {"apply", "core", "formats", "layers", "numeric", "rules"},
    "prune": {"apply", "core", "formats", "layers", "numeric", "projection", "rules", "transforms"},
    "quantize": {"apply", "core", "formats", "layers", "numeric", "rules", "trace", "transforms"},
    "factorize": {"core", "formats", "layers", "numeric"},
    "share": {"core", "formats", "layers", "numeric", "rules"},
    "stored_stats": {"core", "io", "trace"},
    "__main__": {"cli"},
    "cli": {"core", "io", "measure", "rules"},
    "streaming": {"apply", "core", "io", "rules"},
    "sequential": {"apply", "core", "formats", "rules", "trace"},
    "rewrite": {"core", "formats", "layers", "measure", "numeric", "prune", "quantize", "rules", "share", "trace"},
    "budget": {"apply", "core", "formats", "io", "layers", "numeric", "prune", "rules", "trace"},
}


def test_the_ci_script_runs_the_readme_command():
    commands = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert len(commands) == 2
    assert "experiments.compress" in commands[0]
    assert "pytest" in commands[1]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "jcompress":
                yield from (f"jcompress.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_and_stay_public(path):
    room = path.relative_to(ROOT / "jcompress").parts[0].removesuffix(".py")
    for name in imports(path):
        assert "jax._src" not in name
        assert not name.startswith("experiments")
        if name.startswith("jcompress.") and room != "__init__":
            other = name.split(".")[1]
            assert other == room or other in LAYERS[room], f"{room} must not import {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_others_need_of_trace_is_public(path):
    if (ROOT / "jcompress" / "trace") in path.parents:
        return
    names = set(importlib.import_module("jcompress.trace").__all__) | {"accelerate", "calibrate", "shrink"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jcompress.trace"):
            assert node.module == "jcompress.trace"
            assert {alias.name for alias in node.names} <= names
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("jcompress.trace.") for alias in node.names)


# A statistic, a parameter of equations, and attributes of jax modules that bear the name of a primitive.
OTHER_MEANINGS = {"square", "name", "pcast", "shard_map"}


def test_a_primitive_is_named_in_one_place():
    """The table of primitives says all that the readings know of one."""
    rows = importlib.import_module("jcompress.trace.primitives").ROWS
    assert len(rows) > 150
    named = {
        f"{path.relative_to(ROOT)}: {node.value}"
        for path in MODULES
        if (ROOT / "jcompress" / "trace") in path.parents and path.name != "primitives.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in rows and node.value not in OTHER_MEANINGS
    }
    assert not named


def test_no_private_jax():
    assert not [p for p in MODULES if "jax._src" in p.read_text()]
