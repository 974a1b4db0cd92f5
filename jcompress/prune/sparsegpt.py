"""SparseGPT: masks and weights of a layer in one sweep over its inputs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jcompress import core
from jcompress.core import Context
from jcompress.formats import Masked
from jcompress.prune import layout, obs, select
from jcompress.prune.patterns import NM
from jcompress.prune.threshold import keep_largest

Quantizer = Callable[[jax.Array], jax.Array]
_HIGHEST = lax.Precision.HIGHEST
_PANEL = 16
"""Inputs whose errors are spread one by one; a panel of them, then a block, by matrix products."""


@dataclasses.dataclass(frozen=True)
class SparseGPT:
    """Prune a layer and adjust what stays so that its outputs on calibration data change least.

    The inputs of the layer are swept once. At input ``j`` the pruned weights' errors ``e = (w - q) / U_jj`` move the
    weights of later inputs by ``-U_jl e``, where ``U^T U = H^-1`` and ``H`` is the Gram matrix of the inputs, damped:
    each step is optimal brain surgery with the inputs before ``j`` held fixed. Masks are chosen block by block, by the
    largest ``w**2 / U_jj**2`` as the weights are by then, over all outputs together; with a pattern, in each group.
    Each block keeps its share, so that the count is exact (Frantar & Alistarh 2023, arXiv:2301.00774).

    Judge it by the error of outputs, ``tr(dW^T gram dW)``; the weights themselves move away from the dense ones. Needs
    the statistic ``gram``, ``jc.calibrate(fn, params, batches, plan=plan)``; each layer after those before it with
    :func:`jcompress.trace.compress_sequentially`. Computed in float32 at the highest precision, blocks in a
    ``fori_loop``; outputs may be sharded, and only scalars move. ``jc.project`` takes the mask alone.

    Attributes:
      sparsity: the fraction of zeros, in [0, 1]: a number, a traced scalar or an optax schedule. None if a pattern
        fixes it.
      pattern: :class:`NM` over the contracted inputs in their order, or None.
      block_size: inputs between two choices of a mask; with a pattern, a multiple of its ``m``.
      damping: added to the Gram matrix, as a fraction of its mean diagonal. A scalar, traced or not.
      quantizer: joint quantization: a function of the float32 (outputs,) weights of one input that gives them rounded
        to a grid. What it changes is made up for as pruning is.

    Raises:
      ValueError: for a sparsity outside [0, 1], one that disagrees with the pattern, another pattern, a block size
        that is none, or statistics that are missing or of another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([[1.0], [3.0]])}
      >>> plan = jc.plan(params, [("w", jc.prune.SparseGPT(sparsity=0.5, damping=0.0))])
      >>> batches = [jnp.array([[1.0, 1.0], [1.0, 0.0]])]
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], params, batches, plan=plan)
      >>> jc.compress(params, plan, stats=stats)["w"].materialize().round(3).tolist()
      [[0.0], [4.0]]
    """

    sparsity: Any = None
    pattern: NM | None = None
    block_size: int = 128
    damping: Any = 0.01
    quantizer: Quantizer | None = None

    needs: ClassVar[tuple[str, ...]] = ("stats.gram",)
    scope: ClassVar[select.Scope] = "leaf"

    __repr__ = core.method_repr

    def __post_init__(self) -> None:
        obs.check_pattern(self)
        select.validate(self)
        if self.block_size < 1 or (self.pattern is not None and self.block_size % self.pattern.m):
            multiple = "" if self.pattern is None else f" and a multiple of {self.pattern.m}"
            raise ValueError(f"SparseGPT: block_size={self.block_size} must be positive{multiple}")

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the pattern does not fit the shape."""
        if len(shape) == 2:
            select.check(self, path, shape)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Masked:
        """The node for one array."""
        layer, gram = layout.of(w, context, "gram")
        matrix, shown = layer.matrix(), layout.visible(layer, context)
        obs.check_groups(self, context.path, matrix.shape[1])
        sparsity = self.pattern.sparsity if self.pattern is not None else core.value_at(self.sparsity, context.step)
        if core.is_concrete(sparsity):
            select.check_sparsity(f"{context.path}: SparseGPT", sparsity)
        if not w.size:
            return Masked(w, jnp.zeros(w.shape, jnp.bool_))
        sweep = partial(_layer, pattern=self.pattern, block_size=self.block_size, quantizer=self.quantizer)
        if len(matrix) == 1:
            values, mask = sweep(matrix[0], shown[0], gram[0], sparsity, self.damping)
            return layout.masked(layer, values[None], mask[None])
        values, mask = lax.map(lambda x: sweep(x[0], x[1], x[2], sparsity, self.damping), (matrix, shown, gram))
        return layout.masked(layer, values, mask)


def _layer(
    w: jax.Array,
    shown: jax.Array,
    gram: jax.Array,
    sparsity: Any,
    damping: Any,
    *,
    pattern: NM | None,
    block_size: int,
    quantizer: Quantizer | None,
) -> tuple[jax.Array, jax.Array]:
    """Weights and mask (k, n) of one layer."""
    k, n = w.shape
    panel = _panel(pattern, block_size)
    block = min(block_size, -(-k // panel) * panel)
    blocks = -(-k // block)
    kept = [select.kept(min(i * block, k) * n, sparsity) for i in range(blocks + 1)]
    counts = jnp.stack([jnp.asarray(b - a, jnp.uint32) for a, b in itertools.pairwise(kept)])
    w = jnp.where(shown & (jnp.diagonal(gram) > 0)[:, None], w, 0)
    factor = obs.inverse_factor(obs.damped(gram, damping))
    more = blocks * block - k
    # Inputs that fill up the last block: weights of zero that nothing moves, and that go first.
    factor = jnp.pad(factor, ((0, more), (0, more))) + jnp.diag(jnp.pad(jnp.zeros(k), (0, more), constant_values=1.0))
    w, shown = (jnp.pad(x, ((0, more), (0, 0))) for x in (w, shown))
    values, mask = _sweep(w, shown, factor, counts, _Sizes(block, panel), pattern, quantizer)
    return values[:k], mask[:k]


class _Sizes(NamedTuple):
    block: int
    panel: int


def _panel(pattern: NM | None, block_size: int) -> int:
    """How many inputs make a panel: blocks hold whole panels, and panels whole groups of the pattern."""
    m = 1 if pattern is None else pattern.m
    return m * math.gcd(block_size // m, max(1, _PANEL // m))


def _sweep(
    w: jax.Array,
    shown: jax.Array,
    factor: jax.Array,
    counts: jax.Array,
    sizes: _Sizes,
    pattern: NM | None,
    quantizer: Quantizer | None,
) -> tuple[jax.Array, jax.Array]:
    """All blocks. The errors of those done are kept, and a block takes them in when its turn comes."""
    k = len(w)

    def one(i: jax.Array, state: tuple) -> tuple:
        start = i * sizes.block

        def part(j: jax.Array) -> jax.Array:
            return lax.dynamic_slice(factor, (j * sizes.block, start), (sizes.block, sizes.block))

        def take_in(j: jax.Array, current: jax.Array) -> jax.Array:
            errors = _rows(state[2], j * sizes.block, sizes.block)
            return current - jnp.matmul(part(j).T, errors, precision=_HIGHEST)

        current = lax.fori_loop(0, i, take_in, _rows(w, start, sizes.block))
        inner = part(i)
        visible = _rows(shown, start, sizes.block)
        kept = None
        if pattern is None:
            saliency = jnp.square(current / jnp.diagonal(inner)[:, None])
            kept = keep_largest([jnp.where(visible, saliency, -jnp.inf)], counts[i])[0]
        done = _block(current, visible, inner, kept, sizes.panel, pattern, quantizer)
        return tuple(lax.dynamic_update_slice(x, y, (start, 0)) for x, y in zip(state, done, strict=True))

    state = (jnp.zeros_like(w), jnp.zeros(w.shape, jnp.bool_), jnp.zeros_like(w))
    values, mask, _ = lax.fori_loop(0, k // sizes.block, one, state)
    return values, mask


def _rows(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice(x, (start, 0), (size, x.shape[1]))


def _block(
    w: jax.Array,
    shown: jax.Array,
    factor: jax.Array,
    kept: jax.Array | None,
    panel: int,
    pattern: NM | None,
    quantizer: Quantizer | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values, mask and errors of one block, panel by panel."""
    k = len(w)

    def one(i: jax.Array, state: tuple) -> tuple:
        start = i * panel
        columns = lax.dynamic_slice(factor, (0, start), (k, panel))
        current = _rows(w, start, panel) - jnp.matmul(columns.T, state[2], precision=_HIGHEST)
        inner = lax.dynamic_slice(columns, (start, 0), (panel, panel))
        mask = jnp.zeros(current.shape, jnp.bool_) if kept is None else _rows(kept, start, panel)
        done = _inputs(current, _rows(shown, start, panel), inner, mask, pattern, quantizer)
        return tuple(lax.dynamic_update_slice(x, y, (start, 0)) for x, y in zip(state, done, strict=True))

    state = (jnp.zeros_like(w), jnp.zeros(w.shape, jnp.bool_), jnp.zeros_like(w))
    return lax.fori_loop(0, k // panel, one, state)


def _inputs(
    w: jax.Array, shown: jax.Array, factor: jax.Array, mask: jax.Array, pattern: NM | None, quantizer: Quantizer | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values, mask and errors of one panel, input by input."""
    diagonal = jnp.diagonal(factor)
    size = len(w)

    def choose(j: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
        assert pattern is not None
        saliency = jnp.square(_rows(w, j, pattern.m) / lax.dynamic_slice(diagonal, (j,), (pattern.m,))[:, None])
        chosen = pattern.mask(jnp.where(_rows(shown, j, pattern.m), saliency, -jnp.inf))
        return lax.dynamic_update_slice(mask, chosen, (j, 0))

    def one(j: jax.Array, state: tuple) -> tuple:
        w, mask, errors = state
        if pattern is not None:
            mask = lax.cond(j % pattern.m == 0, choose, lambda j, w, mask: mask, j, w, mask)
        row = w[j]
        value = jnp.where(mask[j], row if quantizer is None else quantizer(row), 0)
        error = (row - value) / diagonal[j]
        later = jnp.where(jnp.arange(size) > j, factor[j], 0)
        w = (w - later[:, None] * error).at[j].set(value)
        return w, mask, errors.at[j].set(error)

    return lax.fori_loop(0, size, one, (w, mask, jnp.zeros_like(w)))
