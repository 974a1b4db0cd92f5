"""Plans in files: rules as YAML, JSON or Python have them, the same as in code."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import runpy
from collections.abc import Iterator, Mapping
from typing import Any

import jcompress as jc
from jcompress import io
from jcompress.core import Layout
from jcompress.io import files

_ROOMS = ("prune", "quantize", "factorize", "share")
_COMBINED = ("cartesian", "chain", "residual", "stacked")


@dataclasses.dataclass(frozen=True)
class PlanFile:
    """What a file of rules says.

    Attributes:
      rules: pairs of a pattern and a method, as ``jc.plan`` takes them.
      layout: ``"in-out"``, ``"out-in"`` or layouts by pattern, or None.
      fn: the function that uses the parameters, or None.
      args: arguments of it, arrays or their shapes.
    """

    rules: list[tuple[str, Any]]
    layout: Any = None
    fn: Any = None
    args: tuple[Any, ...] = ()


def read_rules(path: str) -> PlanFile:
    """A Python file that defines ``rules``, or the same as YAML or JSON.

    Raises:
      ValueError: for anything else; the message names the file and the rule.
    """
    if path.endswith(".py"):
        return _of_python(path)
    with files.reading(path) as file:
        text = file.read()
    found = _parsed(path, text)
    if not isinstance(found, dict) or not isinstance(found.get("rules"), list):
        raise ValueError(
            f"{path}: found no list 'rules', expected rules: [{{match: '.*/kernel', method: quantize.Int}}]"
        )
    if unknown := sorted(map(str, set(found) - {"rules", "layout"})):
        raise ValueError(
            f"{path}: found {', '.join(unknown)}, expected 'rules' and 'layout'; a Python file may say more"
        )
    return PlanFile([_rule(path, i, x) for i, x in enumerate(found["rules"])], _layouts(path, found.get("layout")))


def _of_python(path: str) -> PlanFile:
    with files.reading(path):
        pass
    try:
        found = runpy.run_path(path)
    except Exception as error:
        raise ValueError(f"{path}: running it failed: {type(error).__name__}: {error}") from error
    if "rules" not in found:
        raise ValueError(f"{path}: defines no rules; write rules = [('.*/kernel', jc.quantize.Int(bits=4))]")
    return PlanFile(found["rules"], found.get("layout"), found.get("fn"), tuple(found.get("args", ())))


def _parsed(path: str, text: bytes) -> Any:
    try:
        if path.endswith(".json"):
            return json.loads(text)
        import yaml
    except ImportError:
        raise ImportError(f'{path}: YAML needs a package; install it with pip install "jcompress[cli]"') from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON: {error}") from None
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: is no YAML: {error}") from None


def _rule(path: str, i: int, x: Any) -> tuple[str, Any]:
    where = f"{path}: rule {i}"
    if not isinstance(x, dict) or not isinstance(x.get("match"), str) or "method" not in x:
        raise ValueError(f"{where}: found {x!r}, expected match and method, such as {{match: .*/bias, method: null}}")
    fields = {key: y for key, y in x.items() if key != "match"}
    if fields["method"] is None and len(fields) == 1:
        return x["match"], None
    return x["match"], _made(where, fields)


def _made(where: str, x: Any) -> Any:
    """A value of a field: methods and what they are made of are called, lists become tuples."""
    if isinstance(x, list):
        return tuple(_made(where, y) for y in x)
    if not isinstance(x, dict):
        return x
    if set(x) == {"function"}:
        return _named(where, x["function"])
    if "method" not in x:
        raise ValueError(f"{where}: found {x!r}, expected a method, its fields beside its name")
    make, given = _named(where, x["method"]), {key: _made(where, y) for key, y in x.items() if key != "method"}
    if not inspect.isclass(make) and x["method"] not in _COMBINED:
        raise ValueError(f"{where}: found the function {x['method']}, expected a class of methods; write it in Python")
    positional = given.pop("of", ())
    try:
        return make(*(positional if isinstance(positional, tuple) else (positional,)), **given)
    except TypeError as error:
        known = ", ".join(inspect.signature(make).parameters)
        raise ValueError(f"{where}: {x['method']}: {error}; it takes {known}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {x['method']}: {error}") from None


def _named(where: str, name: Any) -> Any:
    """A public name of the rooms of methods, such as ``quantize.Int``."""
    parts = name.split(".") if isinstance(name, str) else []
    known: Any = {**{room: getattr(jc, room) for room in _ROOMS}, **{x: getattr(jc, x) for x in _COMBINED}}
    found: Any = known.get(parts[0]) if parts else None
    for part in parts[1:]:
        found = getattr(found, part, None) if part in getattr(found, "__all__", ()) else None
    if found is None or inspect.ismodule(found):
        near = difflib.get_close_matches(str(name), [*_names(), *_COMBINED], n=3, cutoff=0.3)
        raise ValueError(f"{where}: {name!r} is no method; there are {', '.join(near or _COMBINED)}")
    return found


def _names() -> Iterator[str]:
    for room in _ROOMS:
        yield from (f"{room}.{name}" for name in getattr(jc, room).__all__)


def _layouts(path: str, x: Any) -> Any:
    if x is None or x in ("in-out", "out-in"):
        return x
    if not isinstance(x, dict) or not all(isinstance(y, dict) for y in x.values()):
        raise ValueError(f"{path}: found layout {x!r}, expected out-in or {{pattern: {{inputs: 1, outputs: 0}}}}")
    try:
        given: dict[str, dict[str, Any]] = {k: {name: _made(path, z) for name, z in y.items()} for k, y in x.items()}
        return {pattern: Layout(**fields) for pattern, fields in given.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: layout: {error}") from None


def layouts_of(tensors: io.Tensors, kind: str, chosen: str, said: Any) -> Mapping[str, Layout] | None:
    """The layouts of all kernels of a file.

    Args:
      tensors: the file.
      kind: of the file.
      chosen: what the command was told: ``"auto"``, ``"in-out"`` or ``"out-in"``.
      said: what the plan says.
    """
    if isinstance(said, Mapping):
        return said
    out_in = kind == "gguf" or tensors.metadata.get("format") == "pt"
    name = said if said is not None and chosen == "auto" else chosen
    if name == "in-out" or (name == "auto" and not out_in):
        return None
    found = {}
    for path, x in tensors.shapes.items():
        if len(x.shape) == 3 and kind == "gguf":
            found[path] = Layout(batch=0, outputs=1, inputs=2)
        elif len(x.shape) > 1:
            found[path] = Layout(outputs=0, inputs=1, window=tuple(range(2, len(x.shape))))
    return found
