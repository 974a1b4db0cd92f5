"""Quantization of a random part of the weights."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Masked, Sum


@dataclasses.dataclass(frozen=True)
class QuantNoise(Method):
    """Compress random blocks, and leave the others as they are (Quant-Noise; Fan et al. 2020, arXiv:2004.07320).

    For training with ``jc.simulate``, with another key at each step: the blocks drawn meet their compressed value and
    get the gradient straight through, the others train unbiased. Rate 1 is quantization-aware training, rate 0 dense
    training. Served is what the inner method makes of the weights.

    Attributes:
      method: any method.
      rate: the probability that a block is compressed: a number, a traced scalar or an optax schedule.
      block_size: rows of axis -2 that are drawn together; vectors along their only axis.

    Raises:
      ValueError: for a rate outside [0, 1] or a block size that is not positive, or if no key is given.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)}
      >>> plan = jc.plan(params, [("w", jc.quantize.training.QuantNoise(jc.quantize.Int(bits=1), rate=0.5))])
      >>> step = 7
      >>> noisy = jc.simulate(params, plan, step=step, key=jax.random.fold_in(jax.random.key(0), step))
      >>> 0 < int((noisy["w"] == params["w"]).sum()) < 12
      True
    """

    method: Method
    rate: Any = 0.5
    block_size: int = 1

    reads: ClassVar[tuple[str, ...]] = ("key",)
    wraps: ClassVar[tuple[str, ...]] = ("method",)

    def __post_init__(self) -> None:
        if core.is_concrete(self.rate) and not callable(self.rate) and not 0 <= self.rate <= 1:
            raise ValueError(f"QuantNoise: rate={self.rate} is outside [0, 1]; 1 compresses every block")
        if self.block_size < 1:
            raise ValueError(f"QuantNoise: block_size={self.block_size} must be positive; 1 draws each weight")

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Sum:
        """The node for one array."""
        draw, inner = jax.random.split(context.key)
        node = core.fit(self.method, [w], [dataclasses.replace(context, key=inner)])[0]
        drawn = jax.random.bernoulli(draw, jnp.float32(core.value_at(self.rate, context.step)), self._blocks(w.shape))
        axis = -2 if w.ndim > 1 else -1
        if self.block_size > 1 and w.ndim:
            drawn = jnp.repeat(drawn, self.block_size, axis)
            drawn = jax.lax.slice_in_dim(drawn, 0, w.shape[axis], axis=axis)
        return Sum((Masked(node, drawn), Masked(jnp.copy(w), ~drawn)))

    def _blocks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not shape or self.block_size == 1:
            return shape
        axis = len(shape) - (2 if len(shape) > 1 else 1)
        return (*shape[:axis], -(-shape[axis] // self.block_size), *shape[axis + 1 :])
