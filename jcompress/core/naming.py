"""Where the leaves of a tree are: their paths."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jcompress.core.compressed import PyTree, is_node


def _key_name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def is_variable(x: Any) -> bool:
    """A Flax NNX variable."""
    # Every version of Flax has the first; newer ones have `get_value`, older ones `raw_value`.
    return hasattr(type(x), "get_metadata") and (hasattr(type(x), "get_value") or hasattr(type(x), "raw_value"))


def is_box(x: Any) -> bool:
    """A box around a value, which paths should not show: a variable, or linen's metadata such as ``nn.Partitioned``."""
    return is_variable(x) or (hasattr(type(x), "unbox") and hasattr(type(x), "replace_boxed"))


def children(x: PyTree) -> list[tuple[Any, Any]]:
    """The key and the subtree of each child of a container; of a leaf, none."""
    found = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)[0]
    return [(keys[0], y) for keys, y in found if keys]


def paths(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """All leaves with their paths, such as ``block/0/kernel``; compressed nodes are leaves.

    Names are those of dictionary keys, sequence positions and fields. The ``value`` field of an NNX variable, or of a
    linen box such as ``nn.Partitioned``, is left out, so the same rules serve linen dictionaries, with and without
    metadata, and NNX state.

    Args:
      tree: any pytree.
      is_leaf: what else counts as a leaf, as for ``jax.tree.leaves``.

    Returns:
      Pairs of a path and a leaf, in the order of ``jax.tree.leaves``.

    Raises:
      ValueError: if two leaves have one path, as with keys that hold ``/``; the message names both.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> [path for path, _ in jc.paths({"block": [{"kernel": jnp.ones((2, 2))}, {"kernel": jnp.ones((2, 2))}]})]
      ['block/0/kernel', 'block/1/kernel']
    """
    boxed = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)[0]
    boxes = {keys for keys, x in boxed if is_box(x)}

    def stop(x: Any) -> bool:
        return is_node(x) or (is_leaf is not None and is_leaf(x))

    found, seen = [], dict[str, Any]()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)[0]:
        path = "/".join(map(_key_name, _shown_keys(keys, boxes)))
        if path in seen:
            both = " and ".join(map(jax.tree_util.keystr, (seen[path], keys)))
            raise ValueError(f"{path}: found two leaves of this path, {both}; rename the key that holds '/'")
        seen[path] = keys
        found.append((path, leaf))
    return found


def _shown_keys(keys: tuple, boxes: set[tuple]) -> Iterable:
    """The keys without that of the value in a box."""
    return (key for i, key in enumerate(keys) if keys[:i] not in boxes) if boxes else keys


def closest(name: str, known: Iterable[str]) -> str:
    """What to write in place of a pattern, or a path, that is not among those known."""
    known = list(known)
    if not known:
        return "there are no parameters"
    for wider in (f".*/{name}", f"{name}/.*", f".*/{name}/.*", f".*{name}.*"):
        try:
            if any(re.fullmatch(wider, path) for path in known):
                return f"patterns match whole paths: use {wider!r}, for {len(known)} paths such as {known[0]!r}"
        except re.error:
            continue
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
    return f"there are {len(known)} paths, such as {', '.join(map(repr, near))}"
