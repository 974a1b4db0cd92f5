"""Fitting what was read to a tree that says what to expect; nothing is ever cast."""

from __future__ import annotations

from typing import Any

import jax

from jcompress import core, rules
from jcompress.core import PyTree
from jcompress.io.manifest import StorageError, join


def fill(like: PyTree, tree: PyTree) -> PyTree:
    """The leaves of ``tree`` in the structure of ``like``.

    Raises:
      StorageError: if a path, a format, a static field, a dtype or a shape differs; the message names the path.
    """
    wanted, found = rules.paths(like), dict(rules.paths(tree))
    check_paths(list(found), [path for path, _ in wanted])
    leaves = [_checked(path, found[path], x) for path, x in wanted]
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=core.is_node), leaves)


def check_paths(found: list[str], wanted: list[str]) -> None:
    """Raise if the paths of two trees differ."""
    extra, missing = [p for p in found if p not in set(wanted)], [p for p in wanted if p not in set(found)]
    if extra or missing or len(found) != len(wanted):
        raise StorageError(
            f"restoring into the wrong structure: stored but not expected {extra[:3]}, expected but not stored "
            f"{missing[:3]}; give the structure that was saved"
        )


def _checked(path: str, found: Any, wanted: Any) -> Any:
    if not (core.is_node(found) or core.is_node(wanted)):
        return _placed(path, found, wanted)
    structure: Any = jax.tree.structure(wanted)
    if jax.tree.structure(found) != structure:
        raise StorageError(f"{path}: found {found!r}, expected {wanted!r}; give the structure that was saved")
    leaves = [
        _placed(join(path, name), x, y)
        for (name, x), y in zip(inner_leaves(found), jax.tree.leaves(wanted), strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def inner_leaves(node: Any) -> list[tuple[str, Any]]:
    """The arrays of a node by name, such as ``values/codes``."""
    flat = jax.tree_util.tree_flatten_with_path(node)[0]
    return [(jax.tree_util.keystr(keys, simple=True, separator="/"), x) for keys, x in flat]


def kind(x: Any) -> str:
    """The dtype and shape of an array, concrete or abstract, or the type of anything else."""
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return type(x).__name__


def _placed(path: str, found: Any, wanted: Any) -> Any:
    if kind(found) != kind(wanted):
        raise StorageError(
            f"{path}: found {kind(found)}, expected {kind(wanted)}; nothing is cast: load without like=, then convert"
        )
    sharding = getattr(wanted, "sharding", None)
    spread = sharding is not None and len(sharding.device_set) > 1
    return jax.device_put(found, sharding) if spread else found
