"""``python -m jcompress.io FILE``: what a saved file holds."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jcompress.io.manifest import StorageError, join, too_deep
from jcompress.io.storage import inspect


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


def plain(text: str) -> str:
    """The text without what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def summary(about: dict[str, Any], size: int) -> str:
    """The text that is printed for what :func:`jcompress.io.inspect` gives."""
    leaves = list(rows(about["tree"]))
    width = max((len(path) for path, _ in leaves), default=0)
    lines = [
        f"jcompress {about['jcompress']}, jax {about['jax']}, format version {about['format_version']}",
        f"{size} bytes, of which {about['payload_bytes']} are values",
    ]
    if "metadata" in about:
        lines.append(f"metadata: {json.dumps(about['metadata'], ensure_ascii=False)}")
    lines += [f"plan: {method}: {', '.join(paths)}" for method, paths in about.get("plan", {}).items()]
    return "\n".join([*lines, *(f"{path:<{width}}  {text}" for path, text in leaves)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the summary of each file named; the exit status is 2 if one cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m jcompress.io", description="Show what a saved file holds.")
    parser.add_argument("files", nargs="+", metavar="FILE")
    status = 0
    for file in parser.parse_args(arguments).files:
        try:
            sys.stdout.write(plain(summary(inspect(file), os.path.getsize(file))) + "\n")
        except RecursionError:
            sys.stderr.write(plain(f"{file}: {too_deep()}") + "\n")
            status = 2
        except StorageError as error:
            sys.stderr.write(plain(str(error)) + "\n")
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
