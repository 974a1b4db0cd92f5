"""Greedy path following: each weight is rounded to where the outputs so far want it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Quantized
from jcompress.layers import matrices
from jcompress.layers.rounding import Rounding, filled, rounding
from jcompress.numeric.sweep import Known, sweep
from jcompress.quantize.integer import Int

_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class GPFQ(Method):
    """Round input after input, each to the level that cancels most of the error of outputs left by those before.

    With the error ``u = sum_{s<t} (w_s - q_s) x_s`` on the calibration data, ``q_t`` is the level nearest to
    ``w_t + <x_t, u> / |x_t|**2``: the best given what came before, while :class:`GPTQ` also moves what comes after. The
    relative error falls as one over the number of inputs, where that of rounding does not fall (Zhang, Zhou & Saab
    2022, arXiv:2201.11113). ``<x_t, u>`` is read off the Gram matrix, the statistic ``gram``, so no data is needed; the
    inputs of the compressed layers before are those of :func:`jcompress.compress_sequentially`. Their distance to the
    dense ones is met by weights that :func:`align` has fitted to them. A kernel sharded by inputs is gathered.

    Attributes:
      bits: bits a code, 2 to 16; 2 symmetric bits are the ternary alphabet.
      symmetric: whether the grid is symmetric about zero.
      axis: the axis that has a scale for each index, the output channels by default; None for one scale in all.
      clip: range of the grid, as in :class:`Int`.
      stochastic: round up with the probability of the fraction, for errors that are unbiased (SPFQ; Zhang & Saab 2023,
        arXiv:2309.10975). Needs a key.
      threshold: in steps of the grid; what is to be rounded is drawn towards 0 by so much first, so that more weights
        become 0, and those after make up for them. A scalar, traced or not.

    Raises:
      ValueError: for hyperparameters that :class:`Int` refuses, one bit, a negative threshold, or statistics that are
        missing or of another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([[1.4], [1.4], [7.0]])}
      >>> plan = jc.plan(params, [("w", jc.quantize.GPFQ(bits=4))])
      >>> batches = [jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])]
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], params, batches, plan=plan)
      >>> jc.compress(params, plan, stats=stats)["w"].materialize()[:, 0].tolist()
      [1.0, 2.0, 7.0]
    """

    bits: int = 4
    symmetric: bool = True
    axis: int | None = -1
    clip: Literal["minmax", "mse"] = "minmax"
    stochastic: bool = False
    threshold: Any = 0.0

    def __post_init__(self) -> None:
        if self.bits == 1:
            raise ValueError("GPFQ: bits=1 leaves no level near 0; use bits=2 for -1, 0 and 1")
        if core.is_concrete(self.threshold) and self.threshold < 0:
            raise ValueError(f"GPFQ: threshold={self.threshold} must not be negative; 0 draws nothing towards 0")
        self._grid()

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be in the context."""
        return ("stats.gram", "key") if self.stochastic else ("stats.gram",)

    def _grid(self) -> Int:
        return Int(self.bits, symmetric=self.symmetric, axis=self.axis, clip=self.clip)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the grid cannot take an array of this shape and dtype."""
        self._grid().check(path, shape, dtype)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        layer, gram = matrices.of(w, context, "gram")
        found, node, known = rounding(self._grid(), layer, context, early=True)
        matrix = layer.matrix()
        known = {**known, "shown": matrices.visible(layer, context), "dense": matrix}
        known["shrink"] = self.threshold * known["scale"]
        if self.stochastic:
            known["noise"] = jax.random.uniform(context.key, matrix.shape, jnp.float32) - 0.5
        return filled(node, layer, _followed(matrix, gram, known, rounding=found), known, found)


def _followed(w: jax.Array, gram: jax.Array, known: Known, rounding: Rounding) -> jax.Array:
    """Values (layers, k, n) on the grid."""

    def fix(row: jax.Array, known: Known, pivot: jax.Array) -> tuple[jax.Array, jax.Array]:
        row = jnp.sign(row) * jnp.maximum(jnp.abs(row) - known["shrink"], 0)
        if "noise" in known:
            row = row + known["scale"] * known["noise"]
        value = jnp.where(known["shown"], rounding.value(row, known), 0)
        return value, known["dense"] - value

    def layer(w: jax.Array, gram: jax.Array, known: Known) -> jax.Array:
        w = jnp.where(known["shown"], w, 0)
        norms = jnp.diagonal(gram)
        # Errors move later inputs the other way round than in GPTQ, by what they have in common.
        factor = jnp.where(norms > 0, -jnp.triu(gram, 1) / jnp.where(norms > 0, norms, 1), 0)
        return sweep(w, factor, fix, {**known, "dense": w}, block_size=_BLOCK)[0]

    return jax.vmap(layer)(w, gram, known)
