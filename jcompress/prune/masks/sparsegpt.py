"""SparseGPT: masks and weights of a layer in one sweep over its inputs."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Masked
from jcompress.layers import matrices
from jcompress.layers.rounding import Rounding, filled, rounding, scaled
from jcompress.numeric import scaling
from jcompress.numeric.damping import damped, inverse_factor
from jcompress.numeric.sweep import Decision, Known, sweep
from jcompress.numeric.threshold import keep_largest
from jcompress.prune.masks import obs, selection
from jcompress.prune.masks.patterns import NM


@dataclasses.dataclass(frozen=True)
class SparseGPT(Method):
    """Prune a layer and adjust what stays so that its outputs on calibration data change least.

    The inputs of the layer are swept once. At input ``j`` the pruned weights' errors ``e = (w - q) / U_jj`` move the
    weights of later inputs by ``-U_jl e``, where ``U^T U = H^-1`` and ``H`` is the Gram matrix of the inputs, damped:
    each step is optimal brain surgery with the inputs before ``j`` held fixed. Masks are chosen block by block, by the
    largest ``w**2 / U_jj**2`` as the weights are by then, over all outputs together; with a pattern, in each group.
    Each block keeps its share, so that the count is exact (Frantar & Alistarh 2023, arXiv:2301.00774).

    Judge it by the error of outputs, ``tr(dW^T gram dW)``; the weights themselves move away from the dense ones. Needs
    the statistic ``gram``, ``jc.calibrate(fn, params, batches, plan=plan)``; each layer after those before it with
    :func:`jcompress.trace.compress_sequentially`. Computed in float32 at the highest precision, blocks in a
    ``fori_loop``; outputs may be sharded, and only scalars move; a kernel sharded by inputs is gathered.
    ``jc.project`` takes the mask alone.

    Attributes:
      sparsity: the fraction of zeros, in [0, 1]: a number, a traced scalar or an optax schedule. None if a pattern
        fixes it.
      pattern: :class:`NM` over the contracted inputs in their order, or None.
      block_size: inputs between two choices of a mask; with a pattern, a multiple of its ``m``.
      damping: added to the Gram matrix, as a fraction of its mean diagonal, and raised where that leaves it singular. A
        scalar, traced or not.
      quantizer: joint quantization: a method that gives ``Quantized``, such as ``jc.quantize.Int(bits=4)``; what it
        changes is made up for as pruning is, and the node is ``Masked`` around ``Quantized``. Scales of a group are
        taken when the sweep reaches it, from the weights that stay.

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
    quantizer: Method | None = None

    reads: ClassVar[tuple[str, ...]] = ("stats.gram",)
    wraps: ClassVar[tuple[str, ...]] = ("quantizer",)

    scope: ClassVar[selection.Scope] = "leaf"

    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        obs.check_pattern(self)
        selection.validate(self)
        if self.block_size < 1 or (self.pattern is not None and self.block_size % self.pattern.m):
            multiple = "" if self.pattern is None else f" and a multiple of {self.pattern.m}"
            raise ValueError(f"SparseGPT: block_size={self.block_size} must be positive{multiple}")

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the pattern does not fit the shape."""
        if len(shape) == 2:
            selection.check(self, path, shape)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Masked:
        """The node for one array."""
        layer, gram = matrices.of(w, context, "gram")
        matrix, shown = layer.matrix(), matrices.visible(layer, context)
        obs.check_groups(self, context.path, matrix.shape[1])
        sparsity = self.pattern.sparsity if self.pattern is not None else core.value_at(self.sparsity, context.step)
        if core.is_concrete(sparsity):
            selection.check_sparsity(f"{context.path}: SparseGPT", sparsity)
        if not w.size:
            return Masked(w, jnp.zeros(w.shape, jnp.bool_))
        found: Rounding | None = None
        known: Known = {}
        if self.quantizer is not None:
            found, node, known = rounding(self.quantizer, layer, context, early=False)
            check_spans(context.path, self, found.group_size)
        solve = partial(_solve, pattern=self.pattern, block_size=self.block_size, rounding=found)
        size, counts = scaling.unit([matrix]), self._counts(matrix.shape, sparsity)
        known = {**scaled(known, size.divide), "shown": shown}
        values, known = solve(size.divide(matrix), gram, known, counts, self.damping)
        values, known = size.saturated(values), scaled(known, size.multiply)
        kept = matrices.masked(layer, values, known["mask"])
        return kept if found is None else dataclasses.replace(kept, values=filled(node, layer, values, known, found))

    def _counts(self, shape: tuple[int, ...], sparsity: Any) -> jax.Array:
        """How many weights of each block stay."""
        _, k, n = shape
        edges = [min(i * self.block_size, k) * n for i in range(-(-k // self.block_size) + 1)]
        kept = [selection.kept(edge, sparsity) for edge in edges]
        return jnp.stack([jnp.asarray(b - a, jnp.uint32) for a, b in itertools.pairwise(kept)])


def check_spans(path: str, method: SparseGPT, group: int | None) -> None:
    """Raise unless blocks hold whole groups of the grid, and these whole groups of the pattern, or the other way."""
    m = 1 if method.pattern is None else method.pattern.m
    if group is not None and (method.block_size % group or (group % m and m % group)):
        raise ValueError(
            f"{path}: {method!r} needs a block_size that is a multiple of the grid's groups of {group}, and these of "
            f"the pattern's groups of {m}; use block_size={group * max(1, method.block_size // group)}"
        )


@partial(jax.jit, static_argnames=("pattern", "block_size", "rounding"))
def _solve(
    w: jax.Array, gram: jax.Array, known: Known, counts: Any, damping: Any,
    pattern: NM | None, block_size: int, rounding: Rounding | None,
) -> tuple[jax.Array, Known]:  # fmt: skip
    """Weights (layers, k, n) of all layers, one after the other, and what was decided."""

    def layer(args: tuple) -> tuple[jax.Array, Known]:
        w, gram, known = args
        w = jnp.where(known["shown"], w, 0)
        masks = _masks(counts, pattern, block_size)
        scales = [] if rounding is None else rounding.decisions()
        # Of two decisions about the same inputs, the mask comes first: the scales are for what stays.
        decisions = sorted([masks, *scales], key=lambda d: -d.span)
        known = {**known, "mask": jnp.zeros(w.shape, jnp.bool_)}
        return sweep(w, inverse_factor(damped(gram, damping)), fix, known, decisions, block_size)

    def fix(row: jax.Array, known: Known, pivot: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = jnp.where(known["mask"], row if rounding is None else rounding.value(row, known), 0)
        return value, (row - value) / pivot

    if len(w) == 1:
        return jax.tree.map(lambda x: x[None], layer(jax.tree.map(lambda x: x[0], (w, gram, known))))
    return jax.lax.map(layer, (w, gram, known))


def _masks(counts: Any, pattern: NM | None, block_size: int) -> Decision:
    """The masks, of a block by its share of the sparsity, or of a group of the pattern."""

    def decide(start: jax.Array, w: jax.Array, known: Known, diagonal: jax.Array) -> Known:
        root = w / diagonal[:, None]  # of the saliency, but for its sign
        if pattern:
            mask = pattern.mask(jnp.where(known["shown"], jnp.abs(root), -jnp.inf))
        else:
            mask = keep_largest([root], counts[start // block_size], among=[known["shown"]], by=jnp.abs)[0]
        return {"mask": mask, "shown": known["shown"] & mask}

    return Decision(pattern.m if pattern else block_size, ("mask", "shown"), decide)
