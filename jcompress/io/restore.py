"""Fitting what was read to a tree that says what to expect; nothing is ever cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jcompress import core
from jcompress.core import PyTree
from jcompress.io.encoding import inner_leaves, unique_paths
from jcompress.io.manifest import StorageError, dtype_name, join


def fill(like: PyTree, tree: PyTree) -> PyTree:
    """The leaves of ``tree`` in the structure of ``like``.

    Raises:
      StorageError: if a path, a format, a static field, a dtype or a shape differs; the message names the path.
    """
    wanted, found = dict(unique_paths(like)), dict(unique_paths(tree))
    check_paths(found, wanted)
    dense = _dense_kinds()
    whole = dict(unique_paths(_untied(tree)))
    leaves = [_checked(path, found[path], x, dense, whole[path]) for path, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=core.is_node), leaves)


def _untied(tree: PyTree) -> PyTree:
    """The tree with what its references stand for."""
    try:
        return core.untie(tree)
    except ValueError as error:
        raise StorageError(str(error)) from None


def check_paths(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise if the paths of two trees differ."""
    extra, missing = [p for p in found if p not in wanted], [p for p in wanted if p not in found]
    if extra or missing:
        raise StorageError(
            f"restoring into the wrong structure: stored but not expected {extra[:3]}, expected but not stored "
            f"{missing[:3]}; give the structure that was saved"
        )


def _checked(path: str, found: Any, wanted: Any, dense: Callable[[Any], str], whole: Any) -> Any:
    if not (core.is_node(found) or core.is_node(wanted)):
        return _placed(path, found, wanted)
    is_whole = isinstance(found, core.Reference) and not core.is_node(whole)
    stands_for = kind if is_whole else dense
    if not core.is_node(wanted) and stands_for(whole) in (kind(wanted), _fitted(wanted)):
        return found
    structure: Any = jax.tree.structure(wanted)
    if jax.tree.structure(found) != structure:
        raise StorageError(f"{path}: found {_told(found, dense)}, expected {_told(wanted, dense)}; {_HINT}")
    leaves = [
        _placed(join(path, name), x, y)
        for (name, x), y in zip(inner_leaves(found), jax.tree.leaves(wanted), strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def _fitted(x: Any) -> str:
    """What the node of an array stands for: floats of 8 and 4 bits are fitted as bfloat16."""
    abstract = hasattr(x, "dtype") and hasattr(x, "shape")
    return kind(jax.eval_shape(core.widened, jax.ShapeDtypeStruct(x.shape, x.dtype))) if abstract else kind(x)


_HINT = "give the structure that was saved, or arrays of the shapes and dtypes that its nodes stand for"


def _dense_kinds() -> Callable[[Any], str]:
    """The dtype and shape that a node stands for; nodes of equal structure and shapes are read once."""
    known: dict[Any, str] = {}

    def dense(node: Any) -> str:
        key = jax.tree.structure(node), tuple(map(kind, jax.tree.leaves(node)))
        if key not in known:
            try:
                known[key] = kind(jax.ShapeDtypeStruct(node.shape, node.dtype))
            except AttributeError:
                known[key] = "half of a node"
        return known[key]

    return dense


def _told(x: Any, dense: Callable[[Any], str]) -> str:
    return f"{x!r} for {dense(x)}" if core.is_node(x) else kind(x)


def kind(x: Any) -> str:
    """The dtype and shape of an array, concrete or abstract, or the type of anything else."""
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{dtype_name(x)}[{','.join(map(str, x.shape))}]"
    return type(x).__name__


def _placed(path: str, found: Any, wanted: Any) -> Any:
    if kind(found) != kind(wanted):
        raise StorageError(
            f"{path}: found {kind(found)}, expected {kind(wanted)}; nothing is cast: load without like=, then convert"
        )
    sharding = getattr(wanted, "sharding", None)
    spread = sharding is not None and len(sharding.device_set) > 1
    return jax.device_put(found, sharding) if spread else found
