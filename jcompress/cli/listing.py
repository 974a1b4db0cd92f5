"""``jcompress inspect``: what a file holds, without reading its arrays."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jcompress import io
from jcompress.io import orbax, reading
from jcompress.io.manifest import StorageError, join, too_deep
from jcompress.measure.units import in_bytes
from jcompress_command import FAILED, SAME, say, say_error, table

_LONGEST = 60


def inspect(given: argparse.Namespace) -> int:
    """Print a table a file; those that cannot be read are told of, and the others still shown."""
    status = SAME
    for file in given.files:
        try:
            for path, about in _described(file):
                say(json.dumps({"file": path, **about}) if given.json else _text(path, about))
        except RecursionError:
            say_error(f"{file}: {too_deep()}")
            status = FAILED
        except (StorageError, OSError) as error:
            say_error(str(error))
            status = FAILED
    return status


def _described(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What one file says; of an Orbax checkpoint with several trees, each of them."""
    kind = reading.kind_of(file)
    if kind == "jcompress":
        yield file, _own(file)
        return
    for path in orbax.find(file) if kind == "orbax" else [file]:
        tensors = io.read_tensors(path)
        arrays = {
            name: {"shape": list(x.shape), "kind": tensors.kinds[name], "bytes": tensors.sizes[name]}
            for name, x in tensors.shapes.items()
        }
        yield path, {"format": kind, "metadata": {k: _plain(x) for k, x in tensors.metadata.items()}, "arrays": arrays}


def _own(file: str) -> dict[str, Any]:
    about = io.inspect(file)
    leaves = dict(rows(about.pop("tree")))
    return {"format": "jcompress", "bytes": os.path.getsize(file), **about, "leaves": leaves}


def _plain(x: Any) -> Any:
    """Metadata as JSON has it; what is long is told by its length."""
    if isinstance(x, (list, np.ndarray)) and len(x) > 8:
        return f"{len(x)} values"
    return x.tolist() if isinstance(x, (np.ndarray, np.generic)) else x


def _text(path: str, about: Mapping[str, Any]) -> str:
    if about["format"] == "jcompress":
        return summary(about)
    arrays = about["arrays"]
    count = sum(int(np.prod(x["shape"], dtype=object)) for x in arrays.values())
    lines = [f"{path}: {about['format']}, {len(arrays)} arrays of {count} numbers, {in_bytes(_total(arrays))}"]
    lines += [f"{name}: {_short(x)}" for name, x in about["metadata"].items()]
    rows = [(name, _shape(x["shape"]), x["kind"], in_bytes(x["bytes"])) for name, x in arrays.items()]
    return "\n".join([*lines, table([("name", "shape", "kind", "bytes"), *rows], right=(3,))])


def _total(arrays: Mapping[str, Any]) -> int:
    return sum(x["bytes"] for x in arrays.values())


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _short(x: Any) -> str:
    text = x if isinstance(x, str) else json.dumps(x, ensure_ascii=False)
    text = text.replace("\n", "\\n")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text)} characters)"


def rows(spec: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a manifest's tree, each with its description in one line."""
    if isinstance(spec, dict) and "$" not in spec:
        first: tuple[str, Any] = next(iter(spec.items()), ("", None))
        kind, value = first
        if kind == "$tuple":
            yield from rows(value, path)
        elif kind in ("$dict", "$namedtuple"):
            for name, x in value if kind == "$dict" else value[1].items():
                yield from rows(x, join(path, name))
        elif kind.startswith("$"):
            yield path, str(value)
        else:
            for name, x in spec.items():
                yield from rows(x, join(path, name))
    elif isinstance(spec, list):
        for i, x in enumerate(spec):
            yield from rows(x, join(path, i))
    else:
        yield path, describe(spec)


def describe(spec: Any) -> str:
    """A node, array or value in one line, nodes written like their ``repr``."""
    if isinstance(spec, list):
        return f"({', '.join(map(describe, spec))})"
    if not isinstance(spec, dict):
        return str(spec)
    if "$" not in spec:
        return ", ".join(map(str, spec.values()))
    fields = [f"{name}={describe(x)}" for name, x in spec.items() if name != "$"]
    return f"{spec['$']}({', '.join(fields)})"


def summary(about: Mapping[str, Any]) -> str:
    """The text that is printed for a file of the library's own."""
    width = max(map(len, about["leaves"]), default=0)
    lines = [
        f"jcompress {about['jcompress']}, jax {about['jax']}, format version {about['format_version']}",
        f"{about['bytes']} bytes, of which {about['payload_bytes']} are values",
    ]
    if "metadata" in about:
        lines.append(f"metadata: {json.dumps(about['metadata'], ensure_ascii=False)}")
    lines += [f"plan: {method}: {', '.join(paths)}" for method, paths in about.get("plan", {}).items()]
    return "\n".join([*lines, *(f"{path:<{width}}  {text}" for path, text in about["leaves"].items())])
