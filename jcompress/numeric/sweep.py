"""One sweep over the inputs of a layer: each is fixed in turn, and the inputs after it make up for its error."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jcompress.numeric.meshes import by_outputs

HIGHEST = lax.Precision.HIGHEST
_PANEL = 16
"""Inputs whose errors are spread one by one; those of a panel, then of a block, by matrix products."""

Known = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Decision:
    """What is decided for some inputs together, from their weights as they are when the sweep reaches them.

    Attributes:
      span: how many inputs.
      names: the entries of ``known`` that it gives.
      decide: ``decide(start, w, known, diagonal)`` with the first input, the (span, outputs) weights, what is known
        of these inputs, and the diagonal of the factor; gives new entries of ``known``, one row for each input.
    """

    span: int
    names: tuple[str, ...]
    decide: Callable[[jax.Array, jax.Array, Known, jax.Array], Known]


Fix = Callable[[jax.Array, Known, jax.Array], tuple[jax.Array, jax.Array]]
"""``fix(row, known, pivot)``: from the (outputs,) weights of one input, what is known of it, and its entry on the
diagonal of the factor, its final value and its error."""


def sweep(
    w: jax.Array, factor: jax.Array, fix: Fix, known: Known, decisions: Sequence[Decision] = (), block_size: int = 128
) -> tuple[jax.Array, Known]:
    """Fix the inputs in their order; an error ``e`` of input ``j`` moves a later input ``l`` by ``-factor[j, l] e``.

    Each block takes in the errors of those before it by matrix products when its turn comes, and so does each group
    of inputs inside that a decision spans, and each panel; one by one, errors spread in a panel only.

    Args:
      w: float32 (k, n), inputs by outputs.
      factor: (k, k), upper triangular.
      fix: gives the value and the error of one input.
      known: (k, ...) arrays: masks, scales and the like, one row for each input.
      decisions: from the widest span to the narrowest, each a multiple of the next.
      block_size: a multiple of all spans.

    Returns:
      The values (k, n), and ``known`` as decided.
    """
    k = len(w)
    spans = _spans(block_size, decisions)
    block = min(block_size, -(-k // spans[1]) * spans[1]) if len(spans) > 1 else block_size
    more = -(-k // block) * block - k
    # Inputs that fill up the last block: weights of zero that nothing moves.
    ones = jnp.pad(jnp.zeros(k, factor.dtype), (0, more), constant_values=1.0)
    factor = jnp.pad(factor, ((0, more), (0, more))) + jnp.diag(ones)
    known = {name: by_outputs(x) if x.shape == w.shape else x for name, x in known.items()}
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, more), *[(0, 0)] * (x.ndim - 1))), (by_outputs(w), known))
    whole = [dataclasses.replace(d, span=min(d.span, block)) for d in decisions]
    inside = tuple(span for span in spans if span < block)
    values, made = _blocks(padded[0], padded[1], factor, fix, whole, (block, *inside))
    return jax.tree.map(lambda x: x[:k], (values, made))


def _spans(block_size: int, decisions: Sequence[Decision]) -> tuple[int, ...]:
    """The block, what decisions span, and a panel: each a multiple of the next."""
    spans = sorted({block_size, *(d.span for d in decisions)}, reverse=True)
    for wide, narrow in itertools.pairwise((*spans, 1)):
        if wide > _PANEL >= narrow:
            panel = max(d for d in range(1, _PANEL // narrow + 1) if (wide // narrow) % d == 0) * narrow
            spans = sorted({*spans, panel} - {1}, reverse=True)
    return tuple(spans)


def _blocks(
    w: jax.Array, known: Known, factor: jax.Array, fix: Fix, decisions: list[Decision], spans: tuple[int, ...]
) -> tuple[jax.Array, Known]:
    """All blocks. Only the errors of those done are multiplied; values take the place of the weights."""
    block = spans[0]

    def one(i: jax.Array, state: tuple) -> tuple:
        start = i * block

        def part(j: jax.Array) -> jax.Array:
            return lax.dynamic_slice(factor, (j * block, start), (block, block))

        def take_in(j: jax.Array, current: jax.Array) -> jax.Array:
            return current - jnp.matmul(part(j).T, _rows(state[1], j * block, block), precision=HIGHEST)

        current = lax.fori_loop(0, i, take_in, _rows(state[0], start, block))
        inner = {name: _rows(x, start, block) for name, x in known.items()}
        return _written(state, _span(start, current, inner, part(i), fix, decisions, spans), start)

    start = (w, jnp.zeros_like(w), _decided(known, decisions))
    values, _, made = lax.fori_loop(0, len(w) // block, one, start)
    return values, {**known, **made}


def _span(
    start: jax.Array, w: jax.Array, known: Known, factor: jax.Array, fix: Fix, decisions: list[Decision],
    spans: tuple[int, ...],
) -> tuple[jax.Array, jax.Array, Known]:  # fmt: skip
    """Values, errors and what was decided of inputs whose weights have taken in all errors before them."""
    made: Known = {}
    for decision in decisions:
        if decision.span == spans[0]:
            made |= decision.decide(start, w, {**known, **made}, jnp.diagonal(factor))
    known = {**known, **made}
    if len(spans) == 1:
        return *_inputs(w, known, factor, fix), made
    size = spans[1]

    def one(i: jax.Array, state: tuple) -> tuple:
        at = i * size
        columns = lax.dynamic_slice(factor, (0, at), (spans[0], size))
        current = _rows(state[0], at, size) - jnp.matmul(columns.T, state[1], precision=HIGHEST)
        inner = {name: _rows(x, at, size) for name, x in known.items()}
        done = _span(start + at, current, inner, _rows(columns, at, size), fix, decisions, spans[1:])
        return _written(state, done, at)

    inside = _decided(known, [d for d in decisions if d.span < spans[0]])
    values, errors, found = lax.fori_loop(0, spans[0] // size, one, (w, jnp.zeros_like(w), inside))
    return values, errors, {**made, **found}


def _decided(known: Known, decisions: Sequence[Decision]) -> Known:
    """What the decisions give, as it is before."""
    return {name: known[name] for decision in decisions for name in decision.names}


def _inputs(w: jax.Array, known: Known, factor: jax.Array, fix: Fix) -> tuple[jax.Array, jax.Array]:
    """Input by input, each taking in the errors before it when its turn comes."""

    def one(j: jax.Array, state: tuple) -> tuple:
        values, errors = state
        row = values[j] - jnp.matmul(factor[:, j], errors, precision=HIGHEST)
        value, error = fix(row, {name: x[j] for name, x in known.items()}, factor[j, j])
        return values.at[j].set(value), errors.at[j].set(error)

    return lax.fori_loop(0, len(w), one, (w, jnp.zeros_like(w)))


def _rows(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, size)


def _written(state: tuple, rows: tuple, start: jax.Array) -> tuple:
    return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), start, 0), state, rows)
