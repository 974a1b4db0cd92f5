"""Activations in a few bits where they meet parameters: simulated for training, or multiplied as integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcompress import core, rules
from jcompress.core import PyTree
from jcompress.numeric.surrogates import straight_through
from jcompress.trace import Executed, Product, Range, Weight

Bits = int | Mapping[str, int | None]


def activations(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    stats: Mapping[str, Any] | None = None,
    bits: Bits = 8,
    weight_bits: int | None = 8,
    symmetric: bool = True,
    scale: Literal["tensor", "row"] = "tensor",
    mode: Literal["simulate", "integer"] = "integer",
) -> Executed:
    """The function with its activations quantized wherever a product sums over them and a parameter.

    An activation ``x`` becomes codes ``q = clip(round(x / s) + z)``, a weight codes ``c`` with a scale ``t`` for each
    output, and the product is ``s t (q - z) c``, the scales after the sum (Jacob et al. 2018, arXiv:1712.05877).
    ``mode="integer"`` multiplies int8 with int8 and sums in int32, then rescales once. ``mode="simulate"`` does the
    same with the codes as float32 numbers, so that gradients pass: straight through the rounding where it does not
    clip, and to the scales of the nodes. Sums of integers are exact in float32 below 2**24, so a product in one mode
    equals that in the other up to the rounding of the last float operation. Codes of more than 8 bits, of the
    activation (16 x 8) or of the weight, are multiplied as float32 numbers in both modes: their sums exceed int32.

    Dot products and convolutions of parameters are taken, also through transposes, reshapes, slices, casts, ``scan``,
    ``cond``, ``remat`` and ``jit``; products between activations, such as attention scores, are left as they are.
    Where codes cannot be multiplied (scales that vary along the summed axis, affine weights of 8 bits, floating codes,
    ``weight_bits=None``) the quantized activation is multiplied as floats by the dense weight, in both modes, and
    :meth:`~jcompress.trace.Executed.report` says so. Inside ``shard_map`` all stays float. A function with a
    derivative of its own that multiplies a parameter inside loses it.

    Args:
      fn: any JAX function of ``(params, *args)``.
      params: its parameters, or the tree of nodes and arrays, or their shapes.
      *args: examples of the other arguments, for ``report()``; none are needed.
      stats: from :func:`jcompress.calibrate`, for static ranges: ``{path: Stats}`` with ``absmax``. In place of
        ``Stats`` there may be a largest magnitude, or a pair ``(low, high)``. Products without a range stay float.
        None for ranges of each batch as it comes.
      bits: of an activation's code, 2 to 16; or ``{path: bits}`` by the parameter it meets, where ``None``, or a path
        that is not there, leaves the product as it is.
      weight_bits: for parameters that are arrays: the bits of their symmetric codes, with a scale for each output,
        made anew at each call. None to leave them as they are.
      symmetric: codes ``-m .. m`` with ``m = 2**(bits - 1) - 1``; else ``2**bits`` codes from the lowest to the highest
        value, zero among them and exact. ``Stats`` know a largest magnitude only, so give pairs to gain by it.
      scale: for ranges of each batch, one for the whole activation, or ``"row"``: one for each position (token) of a
        dot product and for each example of a convolution.
      mode: ``"integer"`` or ``"simulate"``.

    Returns:
      An :class:`~jcompress.trace.Executed`: ``quantized(tree, *args)``, where the tree holds
      :class:`~jcompress.formats.Quantized` nodes, other nodes or arrays. It is traced anew at each call: use ``jit``.

    Raises:
      ValueError: for bits outside 2 to 16, an unknown mode or scale, or a range that is not one; the message names the
        path.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> fn = lambda params, x: x @ params["w"]
      >>> params = {"w": jnp.array([[1.0, -2.0], [0.5, 1.0]])}
      >>> tree = jc.compress(params, jc.plan(params, [("w", jc.quantize.Int(bits=8))]))
      >>> x = jnp.array([[0.127, -0.063]])
      >>> quantized = jc.quantize.activations(fn, tree, x)
      >>> y, dense = quantized(tree, x), fn(params, x)
      >>> bool(jnp.allclose(y, dense, rtol=1e-2))
      True
      >>> print(quantized.report())
      path  product      shape  how
      w     dot_general  2x2    int8 x int8 -> int32, scale of the tensor
    """
    leaves = rules.paths(params)
    shapes = {path: jax.eval_shape(core.dense, x) for path, x in leaves}
    given = {path: bits.get(path) for path in shapes} if isinstance(bits, Mapping) else dict.fromkeys(shapes, bits)
    _check(given, weight_bits, scale, mode, stats)
    known = {} if stats is None else {path: stats[path] for path in shapes if path in stats}
    ranges = {path: _ranges(path, shapes[path].shape, stat) for path, stat in known.items()}
    if isinstance(bits, Mapping) and (unknown := sorted(set(bits) - set(shapes))):
        raise ValueError(f"{unknown[0]}: bits are given for it, and there is no such parameter")
    policy = Integers(given, weight_bits, symmetric, scale, mode, stats is not None)
    examples = jax.eval_shape(lambda *xs: xs, params, *args) if args else None
    return Executed(fn, policy, ranges, examples)


def _check(bits: Mapping[str, int | None], weight_bits: int | None, scale: str, mode: str, stats: Any) -> None:
    for path, b in {**bits, "weight_bits": weight_bits}.items():
        if b is not None and not 2 <= b <= 16:
            raise ValueError(f"{path}: bits={b!r} is not an integer from 2 to 16, or None for no codes")
    if mode not in ("simulate", "integer"):
        raise ValueError(f"activations: mode={mode!r} is unknown; use 'simulate' or 'integer'")
    if scale not in ("tensor", "row"):
        raise ValueError(f"activations: scale={scale!r} is unknown; use 'tensor' or 'row'")
    if stats is not None and scale == "row":
        raise ValueError("activations: static ranges have one scale for the tensor; leave out stats for scale='row'")


def _ranges(path: str, shape: tuple[int, ...], stat: Any) -> dict[tuple[int, ...], Range]:
    """What is known of the activation that meets a parameter, for each set of axes it is summed over."""
    if not hasattr(stat, "axes"):
        low, high = stat if isinstance(stat, tuple) else (-stat, stat)
        if jnp.ndim(low) or jnp.ndim(high):
            raise ValueError(f"{path}: found a range of shape {jnp.shape(high)}, expected a scalar, or a pair of them")
        return {(): Range.of(low, high, shape)}
    found = {}
    for use in (stat, *stat.others):
        if use.absmax is not None and use.axes:
            largest = jnp.asarray(use.absmax, jnp.float32).max(-1)
            is_stack = largest.shape == shape[: largest.ndim] and all(len(shape) + a >= largest.ndim for a in use.axes)
            largest = largest if is_stack else largest.max()
            found[use.axes] = Range.of(-largest, largest, shape)
    return found


class Grid(NamedTuple):
    """Scales and zero points of an activation, in its rank; ``zero`` is None on a symmetric grid."""

    scale: jax.Array
    zero: jax.Array | None
    lowest: int
    highest: int

    def codes(self, x: jax.Array) -> jax.Array:
        """The codes as float32, straight through the rounding and cut off where they are clipped."""
        scaled = x.astype(jnp.float32) * (1 / self.scale)
        shift = 0.0 if self.zero is None else self.zero
        rounded = jnp.round(scaled) + shift
        inside = (rounded >= self.lowest) & (rounded <= self.highest)
        passing = jnp.where(inside, scaled, lax.stop_gradient(scaled))
        return straight_through(passing, jnp.clip(rounded, self.lowest, self.highest))

    def levels(self, x: jax.Array) -> jax.Array:
        """What the scale multiplies."""
        return self.codes(x) if self.zero is None else self.codes(x) - self.zero


def _grid(low: jax.Array | None, high: jax.Array, bits: int) -> Grid:
    """The grid from ``low``, or ``-high`` where it is None, to ``high``; codes of up to 8 bits fit into int8."""
    if low is None:
        most = 2 ** (bits - 1) - 1
        return Grid(_positive(high * (1.0 / most)), None, -most, most)
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    scale, half = _positive((high - low) * (1.0 / (2**bits - 1))), 2 ** (bits - 1)
    zero = jnp.clip(jnp.round(-low / scale), 0, 2**bits - 1) - half
    return Grid(scale, zero, -half, half - 1)


def _positive(scale: jax.Array) -> jax.Array:
    return jnp.where(scale >= jnp.finfo(scale.dtype).tiny, scale, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Integers:
    """The policy of :func:`activations`."""

    bits: Mapping[str, int | None]
    weight_bits: int | None
    symmetric: bool
    scale: str
    mode: str
    static: bool

    def multiply(self, product: Product, x: jax.Array, w: Weight, axes: tuple[int, ...]) -> tuple[jax.Array, str]:
        """The product, and how it was made."""
        bits = self.bits.get(w.path.split(", ")[0])
        if bits is None:
            return _float(product, x, w), w.told("float", product)
        grid = self._grid_of(product, x, w, axes, bits)
        if grid is None:
            return _float(product, x, w), "float: there is no range of its activation in stats"
        kind = "static scale" if self.static else f"scale of the {self.scale}"
        w = self._with_codes(product, w)
        reason = _not_integers(product, w, bits)
        if reason:
            quantized = (grid.levels(x) * grid.scale).astype(x.dtype)
            return _float(product, quantized, w), f"float x float, the activation quantized, {kind}: {reason}"
        assert w.scale is not None
        if self.mode == "integer" and max(bits, w.bits or 0) <= 8:
            y, how = _integer_product(product, grid, x, w), "int8 x int8 -> int32"
        else:
            levels = w.levels(jnp.float32)
            y, how = product.apply(grid.levels(x), levels, jnp.float32, lax.Precision.HIGHEST), "codes as float32"
            how += f" of {bits} x {w.bits} bits" if self.mode == "integer" else ""
        scales = product.of_activation(grid.scale, w.values.ndim) * product.of_weight(w.scale.array, x.ndim)
        return (y * scales).astype(product.dtype), f"{how}, {kind}"

    def _grid_of(self, product: Product, x: jax.Array, w: Weight, axes: tuple[int, ...], bits: int) -> Grid | None:
        if self.static:
            known = w.range_of(axes)
            if known is None:
                return None
            low, high = known.of_activation(product, x.ndim)
            return _grid(None, jnp.maximum(-low, high), bits) if self.symmetric else _grid(low, high, bits)
        over = tuple(range(x.ndim)) if self.scale == "tensor" else tuple(product.summed)
        wide = lax.stop_gradient(x).astype(jnp.float32)
        if self.symmetric:
            return _grid(None, jnp.max(jnp.abs(wide), over, keepdims=True, initial=0.0), bits)
        low, high = (f(wide, over, keepdims=True, initial=0.0) for f in (jnp.min, jnp.max))
        return _grid(low, high, bits)

    def _with_codes(self, product: Product, w: Weight) -> Weight:
        """A dense weight with codes made for it."""
        if w.scale is not None or self.weight_bits is None or not jnp.issubdtype(w.values.dtype, jnp.floating):
            return w
        wide = w.values.astype(jnp.float32)
        largest = jnp.max(jnp.abs(lax.stop_gradient(wide)), product.contracted, keepdims=True, initial=0.0)
        grid = _grid(None, largest, self.weight_bits)
        return w.coded(grid.codes(wide), grid.scale, self.weight_bits)


def _float(product: Product, x: jax.Array, w: Weight) -> jax.Array:
    return product.apply(x, w.dense())


def _not_integers(product: Product, w: Weight, bits: int) -> str:
    """Why the weight has no codes for this product, if it has none."""
    if w.scale is None:
        is_real = jnp.issubdtype(w.values.dtype, jnp.floating)
        return w.note or ("the weight has no codes" if is_real else f"there are no codes of {w.values.dtype}")
    if not w.has_scale_of_outputs(product):
        return w.note or "its scales vary along the contraction"
    if w.bits is None:
        return f"its codes are {w.values.dtype}"
    if max(bits, w.bits) > 8:
        return ""
    if w.zero is not None and w.bits > 7:
        return "affine codes of 8 bits less their zero points do not fit into int8"
    if product.terms(w.values.shape) * 2**15 >= 2**31:
        return "its sums do not fit into int32"
    return ""


def _integer_product(product: Product, grid: Grid, x: jax.Array, w: Weight) -> jax.Array:
    """The sum of products of levels, exact in int32, as float32."""
    levels = w.values if w.zero is None else w.values.astype(jnp.int8) - w.zero.array.astype(jnp.int8)
    levels = levels.astype(jnp.int8)
    codes = grid.codes(x).astype(jnp.int8)
    if grid.zero is None:
        return product.apply(codes, levels, jnp.int32).astype(jnp.float32)
    padded, codes = product.padded(codes, grid.zero.astype(jnp.int8))
    total = levels.sum(product.contracted, keepdims=True, dtype=jnp.int32)
    shift = product.of_activation(grid.zero.astype(jnp.int32), w.values.ndim) * product.of_weight(total, x.ndim)
    return (padded.apply(codes, levels, np.int32) - shift).astype(jnp.float32)
