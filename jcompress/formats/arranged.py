"""Nodes for leaves whose axes stand in another order than methods see them in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed, Layout
from jcompress.numeric.meshes import typed_like


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Arranged(Compressed):
    """A node fitted to (batch..., window..., inputs, outputs), standing for a leaf of another order of axes.

    Formats that are elementwise need none: their codes and masks are laid out like the leaf, where that says all. Low
    rank of an (out, in) kernel is ``u @ v`` of the (in, out) one, in this node.

    Attributes:
      inner: the node that a method gave.
      layout: of the leaf.
      sizes: the lengths of the axes that the layout names; axes before them are as in ``inner``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> inner = jc.formats.LowRank(u=jnp.ones((3, 1)), v=jnp.arange(2.0)[None])
      >>> node = jc.formats.Arranged(inner, jc.Layout(inputs=1, outputs=0), (2, 3))
      >>> node.materialize().tolist(), node.nbits()
      ([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], 160)
    """

    inner: Any
    layout: Layout = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ()

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        return self.layout.restore(core.dense(self.inner, key=key), self.sizes)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Arranged:
        where = None if where is None else self.layout.arrange(jnp.broadcast_to(where, w.shape))
        return dataclasses.replace(self, inner=self.inner.project(self.layout.arrange(w), where))

    @classmethod
    def project_together(
        cls, nodes: Sequence[Any], ws: Sequence[jax.Array], wheres: Sequence[jax.Array | None]
    ) -> list[Any]:
        inner = [node.inner for node in nodes]
        laid = [node.layout.arrange(w) for node, w in zip(nodes, ws, strict=True)]
        shown = [
            None if where is None else node.layout.arrange(jnp.broadcast_to(where, w.shape))
            for node, w, where in zip(nodes, ws, wheres, strict=True)
        ]
        found = type(inner[0]).project_together(inner, laid, shown)
        return [dataclasses.replace(node, inner=x) for node, x in zip(nodes, found, strict=True)]

    def seen(self, w: jax.Array) -> Any:
        return [typed_like(jax.eval_shape(self.layout.arrange, w), w), w]

    def finalize(self) -> Compressed:
        return restored(self.inner, self.layout, self.sizes)


def restored(node: Any, layout: Layout, sizes: tuple[int, ...]) -> Any:
    """A node for the leaf, from the one that a method gave for the leaf as it sees it.

    Args:
      node: a node.
      layout: of the leaf.
      sizes: the lengths of the axes of the leaf that the layout names.
    """
    if layout.plain:
        return node
    found = node.relaid(core.Relaying(layout, sizes, back=True)) if core.is_node(node) else None
    return Arranged(node, layout.inner(), sizes[layout.leading :]) if found is None else found


def arranged(node: Any, layout: Layout, sizes: tuple[int, ...]) -> Any:
    """The inverse of :func:`restored`: the node for the leaf as methods see it; a dense array comes to be so, too."""
    if layout.plain or node is None:
        return node
    if isinstance(node, Arranged):
        return node.inner
    found = node.relaid(core.Relaying(layout, sizes, back=False)) if core.is_node(node) else None
    return layout.arrange(core.dense(node)) if found is None else found
