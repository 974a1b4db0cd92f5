"""Scales of inputs chosen so that those that matter are rounded finely."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Frozen, Rescaled
from jcompress.layers import matrices
from jcompress.numeric import extremes, scaling
from jcompress.quantize import clipping
from jcompress.quantize.integer import Int


@dataclasses.dataclass(frozen=True)
class AWQ(Method):
    """Activation-aware scales: weights of input ``i`` times ``s_i = a_i**power`` are quantized, and divided again.

    ``a_i`` is the root mean square of the input, divided by the geometric mean over inputs, and ``power`` the one of
    least output error ``tr(dW^T gram dW)`` among evenly spaced powers from 0 to 1; 0 is no scaling, so the error is
    never above that of the grid alone (Lin et al. 2023, arXiv:2306.00978, who take the mean magnitude of the inputs).
    The node keeps ``1 / s`` in bfloat16, 16 bits an input; :func:`fold_scales` puts it into the layer before instead.
    Needs the statistic ``gram``. One power for a leaf; with ``jc.stacked`` one for each layer. With ``clips`` each
    range is then cut to the part of least output error; ten are a good number. A kernel sharded by inputs is gathered.

    Attributes:
      grid: the method that quantizes, fitted once for each power; with :class:`GPTQ` it gets the Gram matrix of the
        scaled inputs.
      points: how many powers are tried, at least 2.
      clips: how many parts of each range are tried, from the whole down to its half; 1 clips nothing. The error counts
        inputs that share a scale with each other; a leaf is clipped only if its whole error falls.

    Raises:
      ValueError: for fewer points, or statistics that are missing or of another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([[0.4, 0.3], [1.0, -1.0]])}
      >>> plan = jc.plan(params, [("w", jc.quantize.AWQ(jc.quantize.Int(bits=2)))])
      >>> batches = [jnp.array([[10.0, 0.0], [0.0, 1.0]])]
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], params, batches, plan=plan)
      >>> jc.compress(params, plan, stats=stats)["w"].scale
      Frozen(bits=uint16[2,1], dtype=bfloat16)
    """

    grid: Method = Int(bits=4, group_size=128)
    points: int = 20
    clips: int = 1

    reads: ClassVar[tuple[str, ...]] = ("stats.gram",)
    wraps: ClassVar[tuple[str, ...]] = ("grid",)

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"AWQ: points={self.points} must be at least 2: the powers 0 and 1")
        if self.clips < 1:
            raise ValueError(f"AWQ: clips={self.clips} must be positive; 1 clips nothing")

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Rescaled:
        """The node for one array."""
        return _scaled(self, w, context)


@partial(jax.jit, static_argnames="method")
def _scaled(method: AWQ, w: jax.Array, context: Context) -> Rescaled:
    layer, gram = matrices.of(w, context, "gram")
    logs = logarithms(gram)

    def fitted(power: jax.Array) -> tuple[Rescaled, jax.Array]:
        scale = jnp.exp(-power * logs).astype(jnp.bfloat16)
        values, error = tried(method.grid, layer, gram, context, scale.astype(jnp.float32))
        return Rescaled(values, Frozen.of(matrices.spread(layer, scale))), error

    power = best(method.points, lambda power: fitted(power)[1])
    if method.clips == 1:
        return fitted(power)[0]
    scale = jnp.exp(-power * logs).astype(jnp.bfloat16)
    wide, held = scale.astype(jnp.float32), matrices.spread(layer, scale)
    scaled = wide[:, :, None] * gram * wide[:, None, :]
    kernel = layer.of((layer.w / held.astype(jnp.float32)).astype(layer.w.dtype))
    inner = matrices.with_gram(context, scaled)
    return Rescaled(clipping.clipped(method.grid, method.clips, kernel, scaled, inner), Frozen.of(held))


def logarithms(gram: jax.Array) -> jax.Array:
    """Of the root mean squares of the inputs, (layers, k), their mean taken off; 0 for inputs never seen."""
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    logs = jnp.log(jnp.where(diagonal > 0, diagonal, 1)) / 2
    return jnp.where(diagonal > 0, logs - jnp.mean(logs, axis=-1, keepdims=True), 0)


def tried(
    grid: Method, layer: matrices.Contraction, gram: jax.Array, context: Context, scale: jax.Array
) -> tuple[Any, jax.Array]:
    """What the grid makes of a kernel divided by ``scale``, (layers, k), and by how much it moves the outputs."""
    held = matrices.spread(layer, scale)
    inner = matrices.with_gram(context, scale[:, :, None] * gram * scale[:, None, :])
    values = grid((layer.w / held).astype(layer.w.dtype), inner)
    change = layer.of(core.dense(values) * held.astype(layer.w.dtype) - layer.w).matrix()
    change = scaling.unit([layer.w]).divide(change)  # errors of one leaf are compared, in squares
    return values, matrices.moved(jnp.where(matrices.visible(layer, context), change, 0), gram).sum()


def best(points: int, error: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Of so many evenly spaced powers from 0 to 1, that of the least error."""
    powers = jnp.linspace(0, 1, points, dtype=jnp.float32)
    errors = jax.lax.map(error, powers)
    return powers[extremes.argmin(errors)]
