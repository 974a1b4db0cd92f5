"""A public name stands in one place, means one thing, and says all that a reader must know."""

import inspect
import pathlib

import public
import pytest

import jcompress as jc

OBJECTS = public.objects()
DOCUMENTED = {path: value for path, value in OBJECTS.items() if public.documented(value)}
PACKAGE = pathlib.Path(jc.__file__).parent

# One word, two readings: a score of weights under ``scores``, the same score of units under ``structured``.
TWO_READINGS = {"hessian", "random", "taylor"}

# What stands before the parameters: the program they are arguments of, or the plan made from them.
BEFORE_PARAMS = {"fn", "loss", "score", "train", "plan", "keep"}
# jc.search finds the smallest model; the room jc.prune.search has the searches of papers for sparsities.
VERB_AND_ROOM = {"search"}
# These numbers are written to the file, and give the same matrix back in another process.
STORED_SEEDS = {
    "quantize.Rotation",
    "formats.FastProduct",
    "formats.Gathered",
    "share.ACDC",
    "share.Circulant",
    "share.Fastfood",
    "share.Hashed",
    "share.HashedFrequencies",
}


def test_every_object_has_one_path():
    paths = {}
    for path, value in OBJECTS.items():
        paths.setdefault(id(value), []).append(path)
    assert [found for found in paths.values() if len(found) > 1] == []
    assert jc.trace.compress_sequentially is jc.compress_sequentially  # its earlier name, which is not listed


def test_a_room_has_one_path():
    modules = [id(module) for module in public.rooms().values()]
    assert len(set(modules)) == len(modules)


def test_one_name_means_one_thing():
    meanings = {}
    for path, value in OBJECTS.items():
        meanings.setdefault(path.split(".")[-1], {})[id(value)] = path
    twice = {name: list(found.values()) for name, found in meanings.items() if len(found) > 1}
    assert set(twice) <= TWO_READINGS, twice


def test_no_module_bears_the_name_of_a_function():
    names = {path.split(".")[-1] for path, value in OBJECTS.items() if callable(value)}
    modules = {path.stem if path.stem != "__init__" else path.parent.name for path in PACKAGE.rglob("*.py")}
    assert names & modules == VERB_AND_ROOM


def _in_room(room):
    return {path: value for path, value in DOCUMENTED.items() if path.rpartition(".")[0] == room}


@pytest.mark.parametrize("room", public.rooms())
def test_docstrings_say_all(room):
    for path, value in _in_room(room).items():
        missing = public.gaps(path, value)
        assert not missing, f"{path}: the docstring lacks {sorted(missing)}"


@pytest.mark.parametrize("room", public.rooms())
def test_arguments_stand_in_one_order(room):
    for path, value in _in_room(room).items():
        names = [name for name in public.parameters(value) if not name.startswith("_")]
        if not inspect.isclass(value) and "params" in names:
            assert set(names[: names.index("params")]) <= BEFORE_PARAMS, f"{path}{names}: params come first"
        if path not in STORED_SEEDS:
            assert not {"seed", "rng"} & set(names), f"{path}{names}: randomness is key="
