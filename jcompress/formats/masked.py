"""Arrays with entries that are exactly zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed, Relaying
from jcompress.numeric.packing import Expected


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Masked(Compressed):
    """An array whose entries are exactly 0.0 where the mask is False.

    Stored are the kept values and the mask in the cheapest exact code: one bit an entry, the gaps between kept
    entries, one number for each group of an N:M pattern, one bit a row where whole rows go, or nothing.

    Attributes:
      values: float array, or a node that stands for one; its hidden entries are never read.
      mask: boolean array that broadcasts to the shape of ``values``; True keeps.
      expected: what the method knew of the mask beforehand. Read only where the mask has no values, as from
        ``jax.eval_shape``; neither compared nor saved.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.Masked(values=jnp.ones((8, 4)), mask=jnp.eye(8, 4, dtype=bool))
      >>> float(node.materialize().sum()), node.nbits()
      (4.0, 140)
    """

    values: Any
    mask: Any
    expected: Expected = dataclasses.field(default=Expected(), metadata={"static": True, "saved": False})
    elementwise: ClassVar[tuple[str, ...]] = ("values",)

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        values = core.dense(self.values, key=key)
        return jnp.where(self.mask, values, jnp.zeros_like(values))

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Masked:
        if core.is_node(self.values):
            inner = self.mask if where is None else self.mask & where
            return dataclasses.replace(self, values=self.values.project(w, inner))
        return dataclasses.replace(self, values=w)

    @classmethod
    def project_together(
        cls, nodes: Sequence[Any], ws: Sequence[jax.Array], wheres: Sequence[jax.Array | None]
    ) -> list[Any]:
        inner = [node.values for node in nodes]
        if not all(map(core.is_node, inner)):
            return super().project_together(nodes, ws, wheres)
        shown = [node.mask if where is None else node.mask & where for node, where in zip(nodes, wheres, strict=True)]
        found = type(inner[0]).project_together(inner, ws, shown)
        return [dataclasses.replace(node, values=x) for node, x in zip(nodes, found, strict=True)]

    def relaid(self, relaying: Relaying, /) -> Masked | None:
        """Laid out like the leaf, but for N:M patterns, whose code counts groups along axis -2."""
        if self.expected.group is not None:
            return None
        values = self.values.relaid(relaying) if core.is_node(self.values) else relaying.array(self.values)
        mask = relaying.array(self.mask)
        return None if values is None or mask is None else dataclasses.replace(self, values=values, mask=mask)

    def finalize(self) -> Masked:
        if core.is_node(self.values):
            return self
        return dataclasses.replace(self, values=jnp.where(self.mask, self.values, jnp.zeros_like(self.values)))

    def support(self) -> dict[str, jax.Array]:
        return {"values": self.mask}
