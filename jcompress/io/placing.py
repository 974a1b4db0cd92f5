"""Where the arrays of a file go: the sharding of each, from a tree that is like it or from a rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, Sharding

from jcompress import core
from jcompress.core import PyTree
from jcompress.io.decoding import decode
from jcompress.io.encoding import inner_leaves, unique_paths
from jcompress.io.manifest import Place, StorageError
from jcompress.numeric import meshes

Rule = Callable[[str, jax.ShapeDtypeStruct], Sharding | None]
"""Of a path and the shape and dtype of its array gives where it goes, or None for anywhere."""


def places(spec: Any, like: PyTree, rule: Rule | None, dense: Callable[[Any], Any]) -> list[Place]:
    """Where the arrays of each leaf go, in the order in which a manifest has the leaves.

    Args:
      spec: the manifest's tree.
      like: a tree whose leaves may be sharded, or None.
      rule: for the leaves that it does not say it of, or None.
      dense: of a leaf's description gives the shape and dtype of its array.
    """
    count = itertools.count()
    found = dict(unique_paths(decode(spec, lambda leaf: _Leaf(next(count), leaf))))
    leaves = {leaf.number: (path, leaf) for path, leaf in found.items() if isinstance(leaf, _Leaf)}
    wanted = {} if like is None else dict(unique_paths(like))
    return [_place(*leaves[i], wanted, rule, dense) if i in leaves else anywhere for i in range(next(count))]


class _Leaf:
    """Stands where a leaf is to be read."""

    def __init__(self, number: int, spec: Any) -> None:
        self.number, self.spec = number, spec


def anywhere(name: str, shape: tuple[int, ...]) -> Sharding | None:
    """Nothing is known."""
    return None


def _place(path: str, leaf: _Leaf, wanted: Mapping[str, Any], rule: Rule | None, dense: Callable[[Any], Any]) -> Place:
    own = wanted.get(path)
    if core.is_node(own):
        return _of_node(path, own)
    sharding, shape = _spread(own), getattr(own, "shape", None)
    if sharding is None and rule is not None:
        array = dense(leaf.spec)
        sharding, shape = rule(path, array), array.shape
    if sharding is None or shape is None:
        return anywhere
    return _like(path, sharding, shape)


def _of_node(path: str, node: Any) -> Place:
    """As the arrays of a node are, by their names."""
    known = {name: x for name, x in inner_leaves(node) if _spread(x) is not None}

    def place(name: str, shape: tuple[int, ...]) -> Sharding | None:
        x = known.get(name)
        return _checked(path, x.sharding, shape) if x is not None and x.shape == shape else None

    return place


def _like(path: str, sharding: Sharding, dense: tuple[int, ...]) -> Place:
    """As an array is, or the arrays of the node that stands for it, along the axes that they have in common."""
    _checked(path, sharding, dense)

    def place(name: str, shape: tuple[int, ...]) -> Sharding | None:
        if shape == dense:
            return sharding
        return meshes.sharding_like(shape, sharding, dense) if isinstance(sharding, NamedSharding) else None

    return place


def _spread(x: Any) -> Sharding | None:
    """The sharding of an array or a shape that lies on several devices."""
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, Sharding) and len(sharding.device_set) > 1 else None


def _checked(path: str, sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
    try:
        sharding.shard_shape(shape)
    except (ValueError, IndexError) as error:
        told = f"{sharding.spec} over {dict(sharding.mesh.shape)}" if isinstance(sharding, NamedSharding) else sharding
        raise StorageError(
            f"{path}: found the sharding {told}, expected one that divides {shape}; leave an axis whole ({error})"
        ) from None
    return sharding
