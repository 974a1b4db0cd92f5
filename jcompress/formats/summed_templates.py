"""Arrays that are sums of a few templates, which other leaves are sums of as well."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed
from jcompress.numeric import scaling

HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Mixed(Compressed):
    """``sum_k weights_k templates_k`` (Savarese & Maire 2019, arXiv:1902.09701).

    Attributes:
      weights: float32 (..., count), or a node that stands for one. Leading axes are stacked layers.
      templates: float array (..., count, *shape), or a node: a reference, where another leaf owns them.
      count: how many templates.
      ndim: axes of the dense array of one layer.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.Mixed(jnp.array([2.0, -1.0]), jnp.array([[[1.0, 0.0]], [[0.0, 3.0]]]), count=2)
      >>> node.materialize().tolist()
      [[2.0, -3.0]]
    """

    weights: Any
    templates: Any
    count: int = dataclasses.field(kw_only=True, metadata={"static": True})
    ndim: int = dataclasses.field(default=2, metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array, known without the templates' values."""
        own = tuple(getattr(self.templates, "sizes", ()) or self.templates.shape)
        return (*self.weights.shape[:-1], *own[len(own) - self.ndim :])

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        weights, templates = core.dense(self.weights, key=key), core.dense(self.templates, key=key)
        lead, count = weights.shape[:-1], self.count
        if templates.shape[: -self.ndim] != (*lead, count):
            raise ValueError(
                f"Mixed: found templates of shape {templates.shape}, expected {(*lead, count)} and {self.ndim} axes"
            )
        made = _einsum("k,k*->*", len(lead), self.ndim, weights, templates.astype(jnp.float32))
        return scaling.inside(made).astype(templates.dtype)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Mixed:
        """Templates and weights anew, those of least squares. Entries off ``where`` count as zeros."""
        return self.project_together([self], [w], [where])[0]

    @classmethod
    def project_together(
        cls, nodes: Sequence[Any], ws: Sequence[jax.Array], wheres: Sequence[jax.Array | None]
    ) -> list[Any]:
        """Of nodes that share their templates: the best templates for all arrays, and the weights of each."""
        count, ndim = nodes[0].count, nodes[0].ndim
        shown = [w if m is None else jnp.where(m, w, jnp.zeros_like(w)) for w, m in zip(ws, wheres, strict=True)]
        weights, templates = spanned(shown, count, ndim)
        return [node._refitted(a, templates.astype(ws[0].dtype)) for node, a in zip(nodes, weights, strict=True)]

    def _refitted(self, weights: jax.Array, templates: jax.Array) -> Mixed:
        own = core.refitted(self.weights, weights)
        shared = core.refitted(self.templates, templates)
        return dataclasses.replace(self, weights=own, templates=shared)


def spanned(ws: Sequence[jax.Array], count: int, ndim: int) -> tuple[list[jax.Array], jax.Array]:
    """The ``count`` orthogonal templates whose sums are nearest to all arrays, and the weights of each array.

    By the eigenvectors of the inner products of the arrays, which are few.

    Args:
      ws: arrays of one shape, with axes of stacked layers in front, each layer on its own.
      count: how many templates.
      ndim: axes of an array of one layer.
    """
    front, unit = ws[0].ndim - ndim, scaling.unit(ws)
    x = jnp.stack([unit.divide(w) for w in ws], axis=front)
    _, vectors = jnp.linalg.eigh(_einsum("i*,j*->ij", front, ndim, x, x))
    basis = jnp.flip(vectors, axis=-1)[..., :count]  # (..., arrays, count)
    basis = jnp.pad(basis, [(0, 0)] * (basis.ndim - 1) + [(0, count - basis.shape[-1])])
    weights = [basis[..., i, :] for i in range(len(ws))]
    return weights, unit.multiply(_einsum("ik,i*->k*", front, ndim, basis, x))


def _einsum(what: str, front: int, ndim: int, *arrays: jax.Array) -> jax.Array:
    """An einsum of arrays with axes of stacked layers in front, ``*`` for the axes of one array: none is flattened."""
    lead, own = string.ascii_uppercase[:front], string.ascii_uppercase[front : front + ndim]
    sides = what.replace("*", own).split("->")
    told = "->".join(",".join(lead + part for part in side.split(",")) for side in sides)
    return jnp.einsum(told, *arrays, precision=HIGHEST)
