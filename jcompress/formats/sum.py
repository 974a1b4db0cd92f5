"""Sums of nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed, Relaying
from jcompress.formats.codebook import Codebook
from jcompress.formats.masked import Masked
from jcompress.formats.quantized import Quantized, pool
from jcompress.numeric import scaling

_STEPS, _ENOUGH = 100, 1e-13
"""The most steps of conjugate gradients, and the square of what may be left, as a part of the array's."""


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

    @property
    def exact(self) -> bool:  # type: ignore[override]  # it depends on the terms
        """Whether no two terms are fitted in turn."""
        others = [t for t in self.terms if not _is_free(t)]
        return len(others) < 2 or _is_alike(others) or all(map(_is_linear, others))

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        first, *rest = (core.dense(term, key=key) for term in self.terms)
        for term in rest:
            first = first + term
        return scaling.inside(first)

    def relaid(self, relaying: Relaying, /) -> Sum | None:
        terms = [term.relaid(relaying) if core.is_node(term) else relaying.array(term) for term in self.terms]
        return None if any(term is None for term in terms) else Sum(tuple(terms))

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Sum:
        """Exact where at most one term is not a plain mask, or the others are codes and codebooks.

        Else each term in turn is fitted to what the others leave. Where a mask lets a term take any value, the other
        terms need not fit, so they are fitted elsewhere first.
        """
        free = [t for t in self.terms if _is_free(t)]
        others = [t for t in self.terms if not _is_free(t)]
        outside = where
        for term in free:
            outside = ~term.mask if outside is None else outside & ~term.mask
        if _is_alike(others):
            fitted = _together(others, w, outside)
        elif len(others) > 1 and all(map(_is_linear, others)):
            fitted = dict(zip(map(id, others), _jointly([others], [w], [outside])[0], strict=True))
        else:
            fitted = _in_turn(others, w, outside)
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
        """Exact where all terms are codes and codebooks; else each in turn, in all nodes at once, is fitted."""
        if all(_is_linear(term) for node in nodes for term in node.terms):
            return [Sum(tuple(terms)) for terms in _jointly([node.terms for node in nodes], ws, wheres)]
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
    factor = jax.scipy.linalg.cho_factor(gram + 1e-6 * size * jnp.eye(len(terms), dtype=gram.dtype))
    found = jnp.zeros_like(right)
    for _ in range(2):
        left = right - jnp.einsum("...ij,...j->...i", gram, found, precision="highest")
        found = found + jax.scipy.linalg.cho_solve(factor, left[..., None])[..., 0]
    return {id(t): dataclasses.replace(t, scale=found[..., i]) for i, t in enumerate(terms)}


def _is_linear(term: Any) -> bool:
    """Whether a term is linear in what it trains, and projects onto all that it reaches, in float32."""
    if isinstance(term, Codebook):
        words = term.codebook.value if isinstance(term.codebook, core.Common) else term.codebook
        return not core.is_node(words)
    if not isinstance(term, Quantized) or core.is_node(term.scale) or term.dtype != jnp.float32:
        return False
    return term.scale is None or core.is_trainable(term.scale)


@jax.jit
def _jointly(
    rows: Sequence[Sequence[Any]], ws: Sequence[jax.Array], wheres: Sequence[jax.Array | None]
) -> list[tuple[Any, ...]]:
    """What all terms of several sums train, at once: conjugate gradients, each step from all terms' own projections.

    These are the inverse of the diagonal blocks of the normal equations, so what is left is how the terms overlap: few
    steps for codebooks fitted one to what the other left. Sums over entries are all that a step computes.
    """
    unit = scaling.unit(ws)

    def shown(xs: Iterable[jax.Array]) -> list[jax.Array]:
        return [x if where is None else jnp.where(where, x, 0) for x, where in zip(xs, wheres, strict=True)]

    def projected(left: list[jax.Array]) -> Any:
        columns = zip(*rows, strict=True)
        found = [type(column[0]).project_together(column, left, wheres) for column in columns]
        return [tuple(terms) for terms in zip(*found, strict=True)]

    def dense(nodes: Any) -> list[jax.Array]:
        return shown(sum(term.materialize().astype(jnp.float32) for term in terms) for terms in nodes)

    def dot(xs: list[jax.Array], ys: list[jax.Array]) -> jax.Array:
        return jnp.stack([jnp.sum(x * y) for x, y in zip(xs, ys, strict=True)]).sum()

    def add(x: Any, size: jax.Array, y: Any) -> Any:
        return jax.tree.map(lambda a, b: a + size * b, x, y)

    def step(state: tuple) -> tuple:
        number, found, left, way, along, before = state
        size = before / jnp.maximum(dot(along, along), jnp.finfo(jnp.float32).tiny)
        found, left = add(found, size, way), add(left, -size, along)
        nodes = projected(left)
        change = dense(nodes)
        after = dot(left, change)
        turn = after / before
        return number + 1, found, left, add(core.split(nodes)[0], turn, way), add(change, turn, along), after

    left = shown(map(unit.divide, ws))
    nodes = projected(left)
    (way, held), along = core.split(nodes), dense(nodes)
    start = dot(left, along)
    state = (jnp.int32(0), jax.tree.map(jnp.zeros_like, way), left, way, along, start)
    found = jax.lax.while_loop(lambda s: (s[0] < _STEPS) & (s[-1] > _ENOUGH * start), step, state)[1]
    trained = jax.tree.map(unit.multiply, found)
    nodes = core.merge(trained, held)
    return [tuple(_of_dtype(term, w.dtype) for term in terms) for terms, w in zip(nodes, ws, strict=True)]


def _of_dtype(term: Any, dtype: Any) -> Any:
    """A codebook in the dtype of its array; scales stay float32."""
    return (
        jax.tree.map(lambda x: x.astype(dtype) if core.is_trainable(x) else x, term)
        if isinstance(term, Codebook)
        else term
    )


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
