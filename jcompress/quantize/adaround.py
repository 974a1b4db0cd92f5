"""Rounding up or down, learned for the outputs of a layer."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Quantized
from jcompress.layers import matrices
from jcompress.layers.rounding import filled, rounding
from jcompress.quantize.integer import Int


@dataclasses.dataclass(frozen=True)
class AdaRound(Method):
    """Learn for each weight whether it is rounded up or down (Nagel et al. 2020, arXiv:2004.10568).

    ``q = s clip(floor(w / s) + h(v))`` with the rectified sigmoid ``h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)``. Adam
    minimizes ``tr(dW^T gram dW) + penalty sum(1 - |2 h - 1|**b)`` where the first term is measured in units of what a
    weight adds to it under rounding to nearest, so that the penalty means the same in all layers. The exponent ``b``
    falls from 20 to 2 by a cosine, after a fifth of the steps without penalty. At the end ``h`` is 0 or 1, and an
    output whose error grew keeps rounding to nearest, so no output's error is above that. The loss needs the Gram
    matrix alone, the statistic ``gram``, and no data. A kernel sharded by inputs is gathered for its products with it.

    Attributes:
      bits: bits a code, 2 to 16.
      group_size: contracted inputs that share a scale, consecutive along axis -2; None for one scale an output.
      symmetric: whether the grid is symmetric about zero.
      clip: range of the grid, as in :class:`Int`.
      steps: of Adam.
      learning_rate: of Adam, a scalar.
      penalty: weight of the second term.

    Raises:
      ValueError: for hyperparameters that :class:`Int` refuses, one symmetric bit, or statistics that are missing or of
        another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([[1.4], [1.4], [7.0]])}
      >>> plan = jc.plan(params, [("w", jc.quantize.AdaRound(bits=4))])
      >>> batches = [jnp.array([[1.0, 1.0, 0.0], [0.5, 0.0, 1.0]])]
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], params, batches, plan=plan)
      >>> jc.compress(params, plan, stats=stats)["w"].materialize()[:, 0].tolist()
      [2.0, 1.0, 7.0]
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    clip: Literal["minmax", "mse"] = "mse"
    steps: int = 1000
    learning_rate: float = 0.01
    penalty: float = 4.0

    reads: ClassVar[tuple[str, ...]] = ("stats.gram",)

    def __post_init__(self) -> None:
        if self.symmetric and self.bits == 1:
            raise ValueError("AdaRound: one symmetric bit has no level above or below; use bits=2")
        self._grid()

    def _grid(self) -> Int:
        return Int(self.bits, self.group_size, self.symmetric, clip=self.clip)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the grid cannot take an array of this shape and dtype."""
        self._grid().check(path, shape, dtype)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        layer, gram = matrices.of(w, context, "gram")
        found, node, known = rounding(self._grid(), layer, context, early=True)
        matrix = jnp.where(matrices.visible(layer, context), layer.matrix(), 0)
        values = _learned(self, matrix, gram, known["scale"], known.get("zero", jnp.uint8(0)))
        return filled(node, layer, values, known, found)


def _learned(method: AdaRound, w: jax.Array, gram: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """Values (layers, k, n) on the grid."""
    most = 2 ** (method.bits - 1) - 1 if method.symmetric else 2**method.bits - 1
    least, zero = (-most if method.symmetric else 0), zero.astype(jnp.float32)
    below = jnp.floor(w / scale)

    def at(up: jax.Array) -> jax.Array:
        return scale * (jnp.clip(below + up + zero, least, most) - zero)

    def soft(v: jax.Array) -> jax.Array:
        return jnp.clip(1.2 * jax.nn.sigmoid(v) - 0.1, 0, 1)

    nearest = at(jnp.round(w / scale) - below)
    rounded = matrices.moved(nearest - w, gram)
    unit = jnp.maximum(rounded.sum() / max(w.size, 1), 1e-30)

    def loss(v: jax.Array, progress: jax.Array) -> jax.Array:
        exponent = 2 + 9 * (1 + jnp.cos(jnp.pi * progress))
        # Away from 0, where the power's gradient may be NaN.
        firm = jnp.abs(2 * soft(v) - 1) + 1e-6
        away = jnp.sum(1 - firm**exponent)
        return matrices.moved(at(soft(v)) - w, gram).sum() / unit + jnp.where(progress > 0, method.penalty, 0) * away

    adam = optax.adam(method.learning_rate)

    def step(i: jax.Array, state: tuple) -> tuple:
        v, moments = state
        progress = jnp.maximum((i / method.steps - 0.2) / 0.8, 0)
        updates, moments = adam.update(jax.grad(loss)(v, progress), moments)
        return optax.apply_updates(v, updates), moments

    start = jnp.clip((w / scale - below + 0.1) / 1.2, 1e-3, 1 - 1e-3)
    v = jnp.log(start / (1 - start))
    v, _ = jax.lax.fori_loop(0, method.steps, step, (v, adam.init(v)))
    learned = at((soft(v) >= 0.5).astype(jnp.float32))
    return jnp.where((matrices.moved(learned - w, gram) < rounded)[:, None], learned, nearest)
