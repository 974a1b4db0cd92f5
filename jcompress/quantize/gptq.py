"""GPTQ: the codes of a layer in one sweep over its inputs."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Quantized
from jcompress.layers import matrices
from jcompress.layers.rounding import Rounding, filled, rounding, scaled
from jcompress.numeric import scaling
from jcompress.numeric.damping import damped, inverse_factor
from jcompress.numeric.sweep import Known, sweep
from jcompress.quantize.integer import Int


@dataclasses.dataclass(frozen=True)
class GPTQ(Method):
    """Round the inputs of a layer one after the other; those not rounded yet make up for each error.

    The error of input ``j``, ``e = (w - q) / U_jj``, moves the weights of later inputs by ``-U_jl e``, where
    ``U^T U = H^-1`` and ``H`` is the Gram matrix of the inputs, damped: of all real values of the later weights, these
    move the outputs least (Frantar et al. 2022, arXiv:2210.17323). The result is that of rounding to the grid in size
    and form, ``Quantized``; with a Gram matrix that is diagonal it is rounding.

    The scales of a group are taken from its weights as they are when the sweep reaches it; those of whole outputs, and
    all scales where ``order`` is True, from the weights before. Judge it by the error of outputs,
    ``tr(dW^T gram dW)``: the weights themselves are further from the dense ones than rounded ones are. Needs the
    statistic ``gram``, ``jc.calibrate(fn, params, batches, plan=plan)``; each layer after those before it with
    :func:`jcompress.trace.compress_sequentially`. Computed in float32 at the highest precision; layers of one shape
    are compiled once, stacked ones mapped. Sharded by outputs a kernel stays where it is; sharded by inputs it is
    gathered, since each input waits for those before it. Behind a mask, hidden weights stay zeros;
    ``jc.prune.SparseGPT(quantizer=...)`` chooses mask and codes in one sweep.

    Attributes:
      bits: bits a code, 1 to 16.
      group_size: contracted inputs that share a scale, consecutive along axis -2; None for one scale an output.
      symmetric: whether the grid is symmetric about zero.
      order: whether inputs are taken by their Gram diagonal, the largest first, while the scales and the stored form
        keep their places.
      block_size: inputs whose errors are spread by one matrix product. Rounded down to a multiple of the group size,
        or up to it.
      damping: added to the Gram matrix, as a fraction of its mean diagonal, and raised where that leaves it singular. A
        scalar, traced or not.
      clip: range of the grid, as in :class:`Int`.
      pad: whether a last group may be smaller than the others.
      grid: another method that gives ``Quantized``, in place of ``bits``, ``group_size``, ``symmetric``, ``clip`` and
        ``pad``.

    Raises:
      ValueError: for hyperparameters that :class:`Int` refuses, a grid beside others of its own, groups that do not lie
        along what the layer contracts, or statistics that are missing or of another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([[1.4], [1.4], [7.0]])}
      >>> plan = jc.plan(params, [("w", jc.quantize.GPTQ(bits=4, damping=1e-4))])
      >>> batches = [jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])]
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], params, batches, plan=plan)
      >>> jc.compress(params, plan, stats=stats)["w"].materialize()[:, 0].tolist()
      [1.0, 2.0, 7.0]
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    order: bool = False
    block_size: int = 128
    damping: Any = 0.01
    clip: Literal["minmax", "mse"] = "minmax"
    pad: bool = False
    grid: Method | None = None

    reads: ClassVar[tuple[str, ...]] = ("stats.gram",)
    wraps: ClassVar[tuple[str, ...]] = ("_method",)

    def __post_init__(self) -> None:
        own = Int(self.bits, self.group_size, self.symmetric, clip=self.clip, pad=self.pad)
        if self.grid is not None and own != Int(4):
            raise ValueError(f"GPTQ: found grid={self.grid!r} beside {own!r}; give one of them")
        if self.block_size < 1:
            raise ValueError(f"GPTQ: block_size={self.block_size} must be positive")

    @property
    def _method(self) -> Method:
        return self.grid or Int(self.bits, self.group_size, self.symmetric, clip=self.clip, pad=self.pad)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        layer, gram = matrices.of(w, context, "gram")
        found, node, known = rounding(self._method, layer, context, early=self.order)
        group = found.group_size or 1
        block = group * max(1, self.block_size // group)
        known = {**known, "shown": matrices.visible(layer, context)}
        if not w.size:
            return self._method(w, context)
        matrix = layer.matrix()
        size = scaling.unit([matrix])
        known, matrix = scaled(known, size.divide), size.divide(matrix)
        values, known = _solve(matrix, gram, known, self.damping, order=self.order, block=block, rounding=found)
        return filled(node, layer, size.multiply(values), scaled(known, size.multiply), found)


def _solve(
    w: jax.Array, gram: jax.Array, known: Known, damping: Any, order: bool, block: int, rounding: Rounding
) -> tuple[jax.Array, Known]:
    """Values (layers, k, n) on the grid, and the scales of each."""

    def fix(row: jax.Array, known: Known, pivot: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = jnp.where(known["shown"], rounding.value(row, known), 0)
        return value, (row - value) / pivot

    def layer(w: jax.Array, gram: jax.Array, known: Known) -> tuple[jax.Array, Known]:
        turn = jnp.argsort(-jnp.diagonal(gram)) if order else None
        if turn is not None:
            w, known = jax.tree.map(lambda x: x[turn], (w, known))
            gram = gram[turn][:, turn]
        w = jnp.where(known["shown"], w, 0)
        factor = inverse_factor(damped(gram, damping))
        found = sweep(w, factor, fix, known, rounding.decisions(), block)
        return found if turn is None else jax.tree.map(lambda x: jnp.zeros_like(x).at[turn].set(x), found)

    return jax.vmap(layer)(w, gram, known)
