"""Codes of a layer for a coded file: steps by how much each input matters once those after it have made up for it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import DependentCodes, Quantized
from jcompress.layers import matrices
from jcompress.layers.matrices import Contraction
from jcompress.numeric import dependent, scaling
from jcompress.numeric.damping import damped, inverse_factor
from jcompress.numeric.sweep import Known, sweep
from jcompress.quantize import dependent as rounding


@dataclasses.dataclass(frozen=True)
class WaterFilling(Method):
    """Round the inputs of a layer in turn as :class:`GPTQ` does, each in a step of its own, and pay for bits.

    The sweep is that of Frantar et al. (2022, arXiv:2210.17323), the steps those of Gaussian sources (Cover & Thomas
    2006, section 10.3).

    With ``U^T U = H^-1``, ``H`` the Gram matrix of the inputs, an error ``e`` of input ``j`` costs the outputs ``(e /
    U_jj)**2`` once the inputs after it have made up for it. At a given error the bits of an ideal code are fewest where
    all inputs add alike to it, so the step of input ``j`` is in proportion to ``U_jj``: reverse water-filling, at a
    rate where every input gets bits. Codes minimize ``(w / s - level)**2 + price * b``, with ``b`` the code length
    under a Laplace density of the input's own scale, ``-log2`` of its mass in the code's cell. Inputs that matter less
    take wider steps, whose codes cost less: a coded file has tables for classes of inputs. Weights that are zero stay
    zero, and others make up for the errors, so that a pruned network stays pruned.

    A table that is read by rows, such as an embedding, is a product with one-hot vectors: ``H`` has on its diagonal how
    often each row is read, and nothing beside it. ``weigh="counts"`` takes these counts alone, so that words that are
    read a hundred times more often have steps ten times finer. Not for a table that is the last layer too: that has
    the statistics of its product.

    Needs the statistic ``gram``, or ``counts``. An error of a layer's outputs of ``step**2 / 12`` times their energy is
    what rounding in these steps gives, so that one ``step`` for all layers keeps their signals alike. Steps are stored
    in 16 bits, of which a coded file keeps five or six. Sharded by outputs a kernel stays where it is, and a table
    sharded by rows; by inputs a kernel is gathered.

    Attributes:
      step: of the outputs' root mean square, > 0; about ``2**(1.8 - bits)`` for so many bits a weight.
      price: squared steps that a bit is worth, >= 0. The default is that of fine steps; where weights take two bits, a
        tenth of it may lose less at the same size: choose on data held out.
      states: of a trellis along the outputs, as of :class:`Dependent`; 0 for one quantizer.
      bits: bits of the codes at most, 2 to 16; the coded size does not depend on them.
      damping: as of :class:`GPTQ`: a share of the mean added to each input's energy, or to how often a row was read.
        Rows that calibration never read have that alone: 0.1 to 0.3 where others will be read later.
      weigh: ``"gram"``, or ``"counts"`` for a table that is read by rows.

    Raises:
      ValueError: for hyperparameters out of range, or statistics that are missing or of another shape.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jax.random.normal(jax.random.key(0), (32, 64))}
      >>> plan = jc.plan(params, [("w", jc.quantize.WaterFilling(step=0.5))])
      >>> x = jax.random.normal(jax.random.key(1), (256, 32)) * jnp.exp(jax.random.normal(jax.random.key(2), (32,)))
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], params, [x], plan=plan)
      >>> small = jc.compress(params, plan, stats=stats)
      >>> change = x @ (jc.materialize(small)["w"] - params["w"])
      >>> 0.5 < float((change**2).mean() / ((x @ params["w"]) ** 2).mean() / (0.5**2 / 12)) < 2
      True
    """

    step: Any = 0.5
    price: Any = 0.1
    states: Literal[0, 4, 8] = 0
    bits: int = 8
    damping: Any = 0.01
    weigh: Literal["gram", "counts"] = "gram"

    def __post_init__(self) -> None:
        for name, low in (("step", 1e-6), ("price", 0.0), ("damping", 0.0)):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and value < low:
                raise ValueError(f"WaterFilling: {name}={value} must be at least {low:g}")
        if self.states not in (0, *dependent.STATES) or not 2 <= self.bits <= 16:
            raise ValueError(
                f"WaterFilling: states={self.states}, bits={self.bits}, expected 0, 4 or 8, and 2 to 16 bits"
            )
        if self.weigh not in ("gram", "counts"):
            raise ValueError(f"WaterFilling: weigh={self.weigh!r}, expected 'gram' or 'counts'")

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be in the context."""
        return (f"stats.{self.weigh}",)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized | DependentCodes:
        """The node for one array."""
        if self.weigh == "counts" and getattr(context.stats, "count", None) is not None:
            raise ValueError(
                f"{context.path}: found a table that is multiplied too, as a last layer is, expected one that is only "
                "read by rows; use weigh='gram', which takes the statistics of the product"
            )
        layer, energies = matrices.of(w, context, self.weigh)
        matrix, shown, most = layer.matrix(), matrices.visible(layer, context), 2 ** (self.bits - 1) - 1
        if not w.size:
            steps = jnp.ones(matrix.shape[:-1], jnp.float32)
            return self._node(layer, jnp.zeros(matrix.shape, jnp.float32), steps, context)
        unit = scaling.unit([matrix])
        solve = jax.vmap(functools.partial(self._solve if self.weigh == "gram" else self._apart, most=most))
        values, steps = solve(unit.divide(matrix), energies, shown)
        return self._node(layer, values / steps[..., None], unit.saturated(steps), context)

    def _solve(self, w: jax.Array, gram: jax.Array, shown: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
        """Values (k, n) and steps (k,) of one layer."""
        known, gram = _known(w, shown), damped(gram, self.damping)
        w = jnp.where(known["shown"], w, 0)
        factor = inverse_factor(gram)
        energy = jnp.sum(w * jnp.matmul(gram, w, precision=jax.lax.Precision.HIGHEST)) / w.size
        known["step"] = self._steps(w, energy, jnp.diagonal(factor), most)

        def fix(row: jax.Array, known: Known, pivot: jax.Array) -> tuple[jax.Array, jax.Array]:
            value = self._value(row, known, most)
            return value, (row - value) / pivot

        return sweep(w, factor, fix, known)[0], known["step"]

    def _apart(self, w: jax.Array, counts: jax.Array, shown: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
        """The same where no input makes up for another: rows of a table."""
        known, counts = _known(w, shown), counts + self.damping * jnp.mean(counts)
        counts = jnp.where(counts > 0, counts, 1)  # of rows never read, without damping
        w = jnp.where(known["shown"], w, 0)
        energy = jnp.sum(jnp.square(w) * counts[:, None]) / w.size
        known["step"] = self._steps(w, energy, jax.lax.rsqrt(counts), most)
        return jax.vmap(functools.partial(self._value, most=most))(w, known), known["step"]

    def _steps(self, w: jax.Array, energy: jax.Array, pivots: jax.Array, most: int) -> jax.Array:
        """A step for each input: never so small that its largest weight has no code, nor of zeros."""
        steps = self.step * jnp.sqrt(jnp.maximum(energy, 0)) * pivots
        steps = jnp.maximum(steps, jnp.max(jnp.abs(w), axis=1) / most)
        return _short(jnp.where(steps > 0, steps, 1))

    def _value(self, row: jax.Array, known: Known, most: int) -> jax.Array:
        step = jnp.where(known["step"] > 0, known["step"], 1)
        return step * self._levels(row / step, known["shown"], known["density"], most)

    def _levels(self, x: jax.Array, shown: jax.Array, density: jax.Array, most: int) -> jax.Array:
        """The levels of one input's weights, (outputs,), in steps."""
        scale = jnp.sum(jnp.abs(x), where=shown) / jnp.maximum(jnp.sum(shown), 1)
        lengths = laplace_lengths(jnp.maximum(scale, 0.05), most, 2 if self.states else 1)
        prices = self.price * among_zeros(lengths, density, most)
        x = jnp.clip(x, -most, most)
        if self.states:
            unit = jnp.ones((), jnp.float32)
            codes, quantizer = rounding.path(x[:, None], unit, shown[:, None], prices, most, self.states)
            return (codes - jnp.sign(codes) * quantizer / 2)[:, 0]
        near, sign = jnp.round(jnp.abs(x)), jnp.sign(x)
        tried = jnp.stack([near, jnp.maximum(near - 1, 0), jnp.zeros_like(near)])
        costs = (jnp.abs(x) - tried) ** 2 + prices[0, tried.astype(jnp.int32) + most]
        best = jnp.take_along_axis(tried, jnp.argmin(costs, axis=0)[None], axis=0)[0]
        return jnp.where(shown, sign * best, 0)

    def _node(self, layer: Contraction, levels: jax.Array, steps: jax.Array, context: Context) -> Any:
        w, dtype = layer.w, jnp.int8 if self.bits <= 8 else jnp.int16
        levels = layer.of(jnp.zeros(w.shape)).restore(levels)
        scale = matrices.spread(layer, steps).astype(jnp.bfloat16)
        axes = tuple(i - w.ndim for i, n in enumerate(scale.shape) if n == 1)
        kind = np.dtype(w.dtype)
        if self.states:
            codes = (jnp.sign(levels) * jnp.ceil(jnp.abs(levels) - 0.25)).astype(dtype)
            return DependentCodes(codes, scale, self.bits, self.states, axes, dtype=kind)
        return Quantized(jnp.round(levels).astype(dtype), scale, bits=self.bits, axes=axes, dtype=kind)


def _known(w: jax.Array, visible: jax.Array) -> dict[str, jax.Array]:
    """Of each input, which weights are neither hidden nor zero, and how many of those in sight that is."""
    shown = visible & (w != 0)
    density = jnp.sum(shown, axis=1, dtype=jnp.float32) / jnp.maximum(jnp.sum(visible, axis=1), 1)
    return {"shown": shown, "density": density}


def laplace_lengths(scale: jax.Array, most: int, quantizers: int = 1) -> jax.Array:
    """Bits of each code from ``-most`` to ``most`` under a Laplace density, float32 (quantizers, 2 most + 1).

    Args:
      scale: its mean magnitude in steps.
      most: the largest code.
      quantizers: 1 for a grid, 2 for those of a trellis.
    """
    found = []
    for quantizer in range(quantizers):
        m = jnp.abs(jnp.arange(-most, most + 1)).astype(jnp.float32)
        low = jnp.maximum(m - (1 + quantizer) / 2, 0)  # where the cell of a magnitude begins, and where it ends
        low = jnp.where((m == 1) & (quantizer == 1), 0.25, low)
        high = jnp.where(m > 0, m + (1 - quantizer) / 2, 0.25 if quantizer else 0.5)
        bits = low / scale + jnp.log(2.0) - jnp.log1p(-jnp.exp((low - high) / scale))
        zero = -jnp.log1p(-jnp.exp(-high / scale))
        found.append(jnp.where(m > 0, bits, zero) / jnp.log(2.0))
    return jnp.stack(found)


def among_zeros(lengths: jax.Array, density: jax.Array, most: int) -> jax.Array:
    """The same where only a part of all codes, ``density``, is of that kind and the rest are zeros."""
    zero = jnp.log2(1 - density + density * jnp.exp2(-lengths[:, most]))
    return (lengths - jnp.log2(jnp.maximum(density, 1e-6))).at[:, most].set(-zero)


def _short(x: jax.Array) -> jax.Array:
    """Floats of two bits of mantissa, which a coded file stores in few."""
    fraction, exponent = jnp.frexp(x)
    return jnp.ldexp(jnp.round(fraction * 8) / 8, exponent)
