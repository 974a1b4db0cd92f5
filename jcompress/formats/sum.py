"""Sums of nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed, Relaying
from jcompress.formats.masked import Masked
from jcompress.formats.quantized import Quantized, pool
from jcompress.numeric import scaling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Sum(Compressed):
    """A sum of terms, such as quantized + low rank, or sparse + low rank.

    Attributes:
      terms: a tuple of nodes that stand for arrays of one shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> kept = jc.formats.Masked(jnp.array([5.0, 0.0]), jnp.array([True, False]))
      >>> jc.formats.Sum((kept, jc.formats.LowRank(jnp.ones((1,)), jnp.ones((1, 2))))).materialize().tolist()
      [6.0, 1.0]
    """

    terms: tuple[Any, ...]
    elementwise: ClassVar[tuple[str, ...]] = ("terms",)

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        first, *rest = (core.dense(term, key=key) for term in self.terms)
        for term in rest:
            first = first + term
        return scaling.inside(first)

    def relaid(self, relaying: Relaying, /) -> Sum | None:
        terms = [term.relaid(relaying) if core.is_node(term) else relaying.array(term) for term in self.terms]
        return None if any(term is None for term in terms) else Sum(tuple(terms))

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Sum:
        """Exact where at most one term is not a plain mask, or the others are codes whose scales are laid out alike.

        Else each term in turn is fitted to what the others leave. Where a mask lets a term take any value, the other
        terms need not fit, so they are fitted elsewhere first.
        """
        free = [t for t in self.terms if _is_free(t)]
        others = [t for t in self.terms if not _is_free(t)]
        outside = where
        for term in free:
            outside = ~term.mask if outside is None else outside & ~term.mask
        fitted = (_together if _is_alike(others) else _in_turn)(others, w, outside)
        for term in others:
            w = w - fitted[id(term)].materialize()
        for term in free:
            fitted[id(term)] = term.project(w, where)
            w = w - fitted[id(term)].materialize()
        return Sum(tuple(fitted[id(term)] for term in self.terms))

    @classmethod
    def project_together(
        cls, nodes: Sequence[Any], ws: Sequence[jax.Array], wheres: Sequence[jax.Array | None]
    ) -> list[Any]:
        """Each term in turn, in all nodes at once, is fitted to what the others leave."""
        fitted: dict[int, list[Any]] = {}
        for _ in range(4):
            for i in range(len(nodes[0].terms)):
                others = [column for j, column in fitted.items() if j != i]
                rest = [w - sum(column[n].materialize() for column in others) for n, w in enumerate(ws)]
                own = [node.terms[i] for node in nodes]
                fitted[i] = type(own[0]).project_together(own, rest, wheres)
        return [Sum(terms) for terms in zip(*(fitted[i] for i in range(len(fitted))), strict=True)]


def _is_free(term: Any) -> bool:
    return isinstance(term, Masked) and not core.is_node(term.values)


def _is_alike(terms: Sequence[Any]) -> bool:
    """Whether the terms are codes, more than one, whose trainable scales are shared along the same axes."""
    if len(terms) < 2 or not all(isinstance(t, Quantized) for t in terms):
        return False
    trainable = all(t.scale is None or (not core.is_node(t.scale) and core.is_trainable(t.scale)) for t in terms)
    return trainable and len({(t.axes, t.group_size, t.group_axis) for t in terms}) == 1


def _together(terms: Sequence[Quantized], w: jax.Array, where: jax.Array | None) -> dict[int, Any]:
    """The scales of all terms by normal equations, of which there is one set for each index of a scale."""
    first = terms[0]
    levels, w = [t.levels(jnp.float32) for t in terms], w.astype(jnp.float32)
    if where is not None:
        levels, w = [jnp.where(where, x, 0.0) for x in levels], jnp.where(where, w, 0.0)

    def total(x: jax.Array) -> jax.Array:
        return pool(x, first.axes, first.group_size, jnp.add, 0.0, first.group_axis)

    gram = jnp.stack([jnp.stack([total(a * b) for a in levels], -1) for b in levels], -1)
    right = jnp.stack([total(a * w) for a in levels], -1)
    # Equal terms share what they stand for: a ridge decides, and one step of refinement takes its shift back.
    size = jnp.maximum(jnp.trace(gram, axis1=-2, axis2=-1), 1e-30)[..., None, None]
    factor = jax.scipy.linalg.cho_factor(gram + 1e-6 * size * jnp.eye(len(terms)))
    found = jnp.zeros_like(right)
    for _ in range(2):
        left = right - jnp.einsum("...ij,...j->...i", gram, found, precision="highest")
        found = found + jax.scipy.linalg.cho_solve(factor, left[..., None])[..., 0]
    return {id(t): dataclasses.replace(t, scale=found[..., i]) for i, t in enumerate(terms)}


def _in_turn(terms: Sequence[Any], w: jax.Array, where: jax.Array | None, sweeps: int = 4) -> dict[int, Any]:
    """Block coordinate descent; one sweep is exact for one term."""
    fitted: dict[int, Any] = {}
    for _ in range(sweeps if len(terms) > 1 else 1):
        for term in terms:
            rest = w
            for other in terms:
                if other is not term and id(other) in fitted:
                    rest = rest - fitted[id(other)].materialize()
            fitted[id(term)] = term.project(rest.astype(jnp.result_type(w)), where)
    return fitted
