"""One file from many, each with a part of the tree, without decoding what they hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jcompress import core
from jcompress.core import PyTree
from jcompress.io import storage
from jcompress.io.manifest import StorageError
from jcompress.io.tensors import nested
from jcompress.numeric.packing import BitWriter


def save_part(path: str | os.PathLike[str], leaf: PyTree, *, coded: bool = False) -> int:
    """Write one leaf, with what :func:`join` must know of it."""
    bits = None if coded else core.nbits(leaf)
    return storage.save(path, {"leaf": leaf}, metadata={"bits": bits}, coded=coded)


def join(
    path: str | os.PathLike[str],
    parts: Mapping[str, str],
    *,
    plan: Mapping[str, Any] | None = None,
    metadata: Any = None,
    coded: bool = False,
) -> int:
    """Write the file that ``jc.save`` writes of the whole tree; of the parts one at a time is in memory.

    Args:
      path: the file.
      parts: ``{path of a leaf: file}``, each of :func:`save_part`.
      plan: as in :func:`jcompress.save`.
      metadata: as in :func:`jcompress.save`.
      coded: whether the parts are.

    Returns:
      The number of bytes written.
    """
    about = {name: storage.inspect(part) for name, part in parts.items()}
    # In the order in which JAX has the keys of dictionaries, and with it ``jc.compress``.
    names = sorted(about, key=lambda name: name.split("/"))
    tree = nested({name: (about[name]["tree"]["leaf"], parts[name]) for name in names})
    order = [part for _, part in _leaves(tree)]
    sizes = {parts[name]: (x["metadata"]["bits"], x["payload_bytes"]) for name, x in about.items()}
    bits = sum(8 * nbytes if count is None else count for count, nbytes in sizes.values())

    def payload(sink: Callable[[bytes], Any]) -> None:
        writer = BitWriter(sink)
        for part in order:
            data, count = storage.opened(part)[1], sizes[part][0]
            whole = data.size if count is None else count // 8
            if not 0 <= data.size - whole <= 1:
                raise StorageError(f"{part}: found {data.size} bytes, expected {count} bits; remove it, and go on")
            writer.write(data[:whole], 8)
            writer.write(data[whole:], 0 if count is None else count % 8)
        writer.close()

    return storage.seal(path, _spec(tree), -(-bits // 8), payload, plan=plan, metadata=metadata, coded=coded)


def _leaves(tree: Any) -> Iterator[tuple[Any, str]]:
    if isinstance(tree, dict):
        for x in tree.values():
            yield from _leaves(x)
    else:
        yield tree


def _spec(tree: Any) -> Any:
    """As the manifest of a whole tree has dictionaries."""
    if not isinstance(tree, dict):
        return tree[0]
    items = {name: _spec(x) for name, x in tree.items()}
    return {"$dict": [[*item] for item in items.items()]} if any(name.startswith("$") for name in items) else items
