"""One stored copy, many uses: what a leaf shares with another stands in its owner, and is referred to by path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jcompress.core.compressed import Compressed, is_node
from jcompress.numeric.meshes import on_any_mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Reference(Compressed):
    """The array of another leaf, or a field of its node: a node without arrays, so that nothing is stored twice.

    It stands where a leaf of the tree stood (tied embeddings), or a field of a node (a codebook that serves many
    leaves). The verbs resolve it in the tree that both ends are in; alone it has no value. What is done to the owner,
    by an optimizer or a plan, is done to all that refer to it, and the owner's gradient is the sum over all uses.

    Attributes:
      owner: the path of the leaf, followed by the fields that lead into its node: ``"embed/embedding"``,
        ``"block/0/kernel/values/codebook"``.
      axes: the order of the owner's last axes, as negative numbers: ``(-1, -2)`` for a transposed matrix. () for the
        owner as it is.
      sizes: the lengths of its own last axes, after the change of order; () if they are not known. Axes in front of
        them are free, as those of stacked layers are.
      value: what it stands for, where a tree was resolved; else None.

    Raises:
      ValueError: when it is made dense outside the tree.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> tree = {"embed": jnp.ones((5, 2)), "head": jc.formats.Reference("embed", axes=(-1, -2))}
      >>> jc.materialize(tree)["head"].shape, jc.nbits(tree) // 32
      ((2, 5), 10)
    """

    owner: str = dataclasses.field(metadata={"static": True})
    axes: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    value: Any = None

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        """The owner's array, its axes in the order of this one."""
        if self.value is None:
            raise ValueError(
                f"a reference to {self.owner} has no value by itself; call jc.materialize on the tree that holds both, "
                "or jc.untie(tree) before a part of it is taken out"
            )
        return self.turned(self.value.materialize(key=key) if is_node(self.value) else self.value)

    def turned(self, x: Any) -> Any:
        """The owner's array with its axes in the order of this one."""
        front = x.ndim - len(self.axes)
        return jnp.transpose(x, (*range(front), *(x.ndim + a for a in self.axes))) if self.axes else x

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Reference:
        """Itself: what it stands for is refitted where its owner is."""
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array, as far as it is known."""
        return self.sizes if self.value is None and self.sizes else super().shape

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape, its axes in this order, can be what it stands for."""
        known = min(len(shape), len(self.sizes))
        return known == 0 or tuple(shape[-known:]) == self.sizes[-known:]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Common(Compressed):
    """What a method found for several arrays at once: on its way from the method to the tree, one copy in each node.

    Attributes:
      value: array or node, or None where it is to be fitted.
      group: which of them are one: those of equal groups.
      sizes: its shape, where it has no value.
    """

    value: Any
    group: tuple[Any, ...] = dataclasses.field(default=(), metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        """The array."""
        return self.value.materialize(key=key) if is_node(self.value) else self.value

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Common:
        """The same for another array."""
        return dataclasses.replace(self, value=self.value.project(w, where) if is_node(self.value) else w)


def tagged(node: Any, tag: Any) -> Any:
    """The node of one part of a composed method: what it shares, it shares with those of the same part."""
    return mapped(node, lambda x, _: dataclasses.replace(x, group=(tag, *x.group)) if isinstance(x, Common) else x)


def settled(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """The nodes of a unit, what they share kept by the first one and referred to by the others.

    Args:
      nodes: by the path of their leaf.
    """
    owners: dict[tuple[Any, ...], str] = {}

    def one(x: Any, path: str) -> Any:
        if not isinstance(x, Common):
            return x
        owner = owners.setdefault(x.group, path)
        if owner == path:
            return mapped(x.value, one, path)
        return Reference(owner, sizes=x.sizes or tuple(x.value.shape))

    return {path: mapped(node, one, path) for path, node in nodes.items()}


def _unsettled(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`settled`, where the owners are among the nodes."""
    shared = {x.owner: x.sizes for node in nodes.values() for x in references(node) if not x.axes}
    shared = {owner: sizes for owner, sizes in shared.items() if any(p in nodes for p in _prefixes(owner))}

    def one(x: Any, path: str) -> Any:
        if isinstance(x, Reference):
            return Common(None, (x.owner,), x.sizes) if x.owner in shared else x
        return Common(x, (path,), shared[path]) if path in shared else x

    return {path: mapped(node, one, path, frozenset(shared)) for path, node in nodes.items()}


def mapped(x: Any, call: Callable[[Any, str], Any], path: str = "", also: frozenset[str] = frozenset()) -> Any:
    """A node with ``call(part, path)`` in place of every reference and common part, and of the parts at ``also``."""
    if isinstance(x, (Reference, Common)) or path in also:
        return call(x, path)
    if isinstance(x, tuple):
        return tuple(mapped(y, call, f"{path}/{i}", also) for i, y in enumerate(x))
    if not is_node(x):
        return x
    fields = [f.name for f in dataclasses.fields(x) if not f.metadata.get("static")]
    found = {name: mapped(getattr(x, name), call, f"{path}/{name}", also) for name in fields}
    changed = {name: y for name, y in found.items() if y is not getattr(x, name)}
    return dataclasses.replace(x, **changed) if changed else x


def unsized(tree: Any) -> Any:
    """The tree with references that fit owners of any shape, as where these are cut."""
    return jax.tree.map(
        lambda x: dataclasses.replace(x, sizes=()) if isinstance(x, Reference) else x,
        tree,
        is_leaf=lambda x: isinstance(x, Reference),
    )


def references(node: Any) -> list[Reference]:
    """The references in a node."""
    if not is_node(node):
        return []
    found = jax.tree.leaves(node, is_leaf=lambda x: isinstance(x, Reference))
    return [x for x in found if isinstance(x, Reference) and x.value is None]


def projected(nodes: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Every node with its trainable leaves refitted to its array, those that share parts together."""
    found: dict[str, Any] = {}
    for linked in _linked(nodes):
        if len(linked) == 1:
            found |= {path: node.project(arrays[path]) for path, node in linked.items()}
            continue
        found |= settled(_together(_unsettled(linked), {path: arrays[path] for path in linked}))
    return {path: found[path] for path in nodes}


def _together(nodes: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    def made(nodes: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
        own = list(nodes.values())
        found = type(own[0]).project_together(own, list(arrays.values()), [None] * len(own))
        return dict(zip(nodes, found, strict=True))

    def like(nodes: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
        return {path: node.seen(arrays[path]) for path, node in nodes.items()}

    return on_any_mesh(made, like)(nodes, arrays)


def _linked(nodes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Nodes of one format that share parts, the owner first; others one by one."""
    groups = {path: {path: node} for path, node in nodes.items()}
    for path, node in nodes.items():
        for reference in references(node):
            owner = next((p for p in _prefixes(reference.owner) if p in groups), path)
            if owner != path and path in groups and type(nodes[owner]) is type(node):
                groups[owner] |= groups.pop(path)
    yield from groups.values()


def _prefixes(path: str) -> Iterator[str]:
    """The path, and those it begins with, longest first."""
    while path:
        yield path
        path = path.rpartition("/")[0]
