"""Codes of vectors that need no codebook: the lattice E8, and trellises. The best that is known at 2 bits a weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Coded
from jcompress.layers import matrices
from jcompress.layers.matrices import Contraction
from jcompress.numeric import lattice, scaling
from jcompress.numeric.damping import damped, inverse_factor
from jcompress.numeric.sweep import Decision, Known, sweep

_PANEL = 128
HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class E8P(Method):
    """Eight inputs of one output as a point of the lattice E8: 2 bits a weight (QuIP#; Tseng et al. 2024).

    E8 packs spheres densest in eight dimensions. A word is one of 256 vectors of magnitudes, with signs whose last
    follows from the others, and 1/4 more or less in all entries: 16 bits, found exactly. Of Gaussian weights the
    squared error is 0.092 of their variance, where the best four values have 0.118. So weights should look Gaussian,
    as they do under ``jc.quantize.Rotation(jc.quantize.E8P())``. One scale an output is stored beside the codes.

    With ``weigh="gram"`` the layer's outputs count, as in :class:`GPTQ`: eight inputs are rounded together, and those
    after them make up for their errors. What is sharded by inputs is gathered then.

    Attributes:
      weigh: ``"gram"``, or None for the weights alone.
      damping: as in :class:`GPTQ`.

    Raises:
      ValueError: for a number of inputs that 8 does not divide, or statistics that are missing or do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> w = jax.random.normal(jax.random.key(0), (256, 64))
      >>> node = jc.quantize.E8P()(w)
      >>> bool(jnp.mean(jnp.square(node.materialize() - w)) < 0.095), node.nbits() - 32 * 64 == 2 * w.size
      (True, True)

    Reference: arXiv:2402.04396.
    """

    weigh: Literal["gram"] | None = None
    damping: Any = 0.01

    def __post_init__(self) -> None:
        _check_weigh(self)

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistic that weighs."""
        return ("stats.gram",) if self.weigh else ()

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise unless 8 divides the inputs."""
        _check_block(self, path, (lattice.SIZE, 1), shape)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Coded:
        """The node for one array."""
        return _fitted(self, w, context, Coded(None, None, "e8p"), lattice.SPREAD)


@dataclasses.dataclass(frozen=True)
class Trellis(Method):
    """A block of weights as a walk on a trellis, ``bits`` a weight (QTIP; Tseng et al. 2024).

    A weight is a function of the last ``memory`` bits of its block, which the next weight moves on by ``bits``: a code
    of as many dimensions as the block has weights, without a codebook. The function is a few instructions that give
    about Gaussian numbers; the walk is found by dynamic programming over the ``2**memory`` states, and closes on
    itself. Of Gaussian weights at 2 bits the squared error is 0.078 of their variance with 10 bits of memory, 0.073
    with 12 and 0.068 with 16, where no code has less than 0.063; each bit doubles the time of the search. To be used
    as ``jc.quantize.Rotation(jc.quantize.Trellis())``. One scale an output is stored beside the codes.

    With ``weigh="gram"`` the layer's outputs count, as in :class:`GPTQ`: the inputs of a block are rounded together,
    and those after them make up for their errors; blocks of few inputs then do better. What is sharded is gathered.

    Attributes:
      bits: bits a weight, 1 to 8.
      memory: bits that a weight depends on, up to 16.
      code: ``"3inst"`` or ``"1mad"``, the function.
      block: inputs and outputs of a block.
      weigh: ``"gram"``, or None for the weights alone.
      damping: as in :class:`GPTQ`.

    Raises:
      ValueError: for a memory that is not more than the bits or more than the block has, a block that does not tile the
        array, or statistics that are missing or do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> w = jax.random.normal(jax.random.key(0), (64, 64))
      >>> node = jc.quantize.Trellis(memory=8)(w)
      >>> bool(jnp.mean(jnp.square(node.materialize() - w)) < 0.1), node.nbits() - 32 * 64 == 2 * w.size
      (True, True)

    Reference: arXiv:2406.11235.
    """

    bits: int = 2
    memory: int = 12
    code: Literal["3inst", "1mad"] = "3inst"
    block: tuple[int, int] = (16, 16)
    weigh: Literal["gram"] | None = None
    damping: Any = 0.01

    def __post_init__(self) -> None:
        _check_weigh(self)
        if self.code not in ("3inst", "1mad"):
            raise ValueError(f"Trellis: code={self.code!r} is unknown; use '3inst' or '1mad'")
        if not 1 <= self.bits <= 8 or not self.bits < self.memory <= 16:
            raise ValueError(
                f"Trellis: bits={self.bits}, memory={self.memory}, expected 1 to 8 bits, and a memory of more, up to 16"
            )
        if len(self.block) != 2 or min(self.block) < 1 or math.prod(self.block) * self.bits < self.memory:
            raise ValueError(
                f"Trellis: block={self.block} of {self.bits} bits a weight, expected inputs and outputs whose bits are "
                f"at least memory={self.memory}"
            )
        if self.weigh and self.block[0] == 1:
            raise ValueError(f"Trellis: weigh='gram' found block={self.block}, expected blocks of 2 inputs or more")

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistic that weighs."""
        return ("stats.gram",) if self.weigh else ()

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise unless blocks tile the array."""
        _check_block(self, path, self.block, shape)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Coded:
        """The node for one array."""
        return _fitted(self, w, context, Coded(None, None, self.code, self.bits, self.memory, self.block), 1.0)


def _check_weigh(method: Any) -> None:
    if method.weigh not in ("gram", None):
        raise ValueError(f"{type(method).__name__}: weigh={method.weigh!r}, expected 'gram' or None")


def _check_block(method: Any, path: str, block: Sequence[int], shape: tuple[int, ...]) -> None:
    if len(shape) < 2 or any(n % b for n, b in zip(shape[-2:], block, strict=True)):
        fits = tuple(math.gcd(n, b) for n, b in zip(shape[-2:], block, strict=False))
        fix = f"use block={fits}, or others that do" if hasattr(method, "block") and len(fits) == 2 else "keep it dense"
        raise ValueError(
            f"{path}: {type(method).__name__} found shape {shape}, whose inputs and outputs blocks of {tuple(block)} "
            f"do not tile; {fix}"
        )


def _fitted(method: Any, w: jax.Array, context: Context, empty: Coded, spread: float) -> Coded:
    """The node for one array: levels are its entries over the standard deviation of their output."""
    method.check(context.path, w.shape, w.dtype)
    empty = dataclasses.replace(empty, axes=tuple(range(-w.ndim, -1)))
    shown = w if context.where is None else jnp.where(context.where, w, jnp.zeros_like(w))
    unit = scaling.unit([w])
    x = unit.divide(shown)
    scale = jnp.sqrt(jnp.mean(jnp.square(x), empty.axes, keepdims=True)) / spread
    empty = dataclasses.replace(empty, scale=scale)
    if method.weigh and w.size:
        node = _swept(method, x, context, empty)
        return dataclasses.replace(node, scale=unit.multiply(node.scale).astype(w.dtype))
    return empty.encode(_over(x, scale)).project(shown)


def _over(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x / jnp.where(scale > 0, scale, 1)


def _swept(method: Any, w: jax.Array, context: Context, empty: Coded) -> Coded:
    """Blocks of inputs one after the other, those that follow making up for their errors; the scales fit outputs."""
    layer, gram = matrices.of(w, context, "gram")
    _check_layer(method, layer, empty.block)
    inputs, _ = empty.block
    flat = dataclasses.replace(empty, axes=(-2,))
    rows = inputs if empty.code == "e8p" else 1  # that one row of codes stands for

    def decide(start: jax.Array, w: jax.Array, known: Known, diagonal: jax.Array) -> Known:
        node = dataclasses.replace(flat, scale=known["scale"][:1])
        node = node.encode(_over(w, node.scale))
        return {"value": node.materialize(), "codes": jnp.repeat(node.codes, rows, axis=0)}

    def fix(row: jax.Array, known: Known, pivot: jax.Array) -> tuple[jax.Array, jax.Array]:
        return known["value"], (row - known["value"]) / pivot

    def one(w: jax.Array, gram: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        known = {"scale": jnp.broadcast_to(scale, w.shape), "value": w, "codes": jnp.zeros(w.shape, jnp.uint16)}
        decision = Decision(inputs, ("value", "codes"), decide)
        gram = damped(gram, method.damping)
        found = sweep(w, inverse_factor(gram), fix, known, [decision], inputs * max(1, _PANEL // inputs))[1]
        return found["codes"][::rows], _fit_scale(w, found["value"], scale, gram)

    codes, scales = jax.vmap(one)(layer.matrix(), gram, layer.of(empty.scale).matrix())
    laid_out = jax.eval_shape(lambda: empty.encode(w).codes)
    codes = layer.of(jnp.zeros(laid_out.shape)).restore(codes.astype(jnp.float32)).astype(laid_out.dtype)
    return dataclasses.replace(empty, codes=codes, scale=layer.of(empty.scale).restore(scales))


def _fit_scale(w: jax.Array, values: jax.Array, scale: jax.Array, gram: jax.Array) -> jax.Array:
    """The scales (1, n) with which the outputs of ``values`` (k, n) are nearest to those of the weights."""
    made = jnp.matmul(gram, values, precision=HIGHEST)
    most = jnp.sum(made * values, axis=0, keepdims=True)
    return scale * jnp.sum(made * w, axis=0, keepdims=True) / jnp.where(most > 0, most, 1)


def _check_layer(method: Any, layer: Contraction, block: tuple[int, int]) -> None:
    """Raise unless blocks lie inside what the layer contracts, and the outputs of a group."""
    shape, ndim = layer.w.shape, layer.w.ndim
    if layer.axes != tuple(range(layer.lead, ndim - 1)) or shape[-1] // layer.split % block[1]:
        raise ValueError(
            f"{layer.path}: {type(method).__name__}(weigh='gram') found shape {shape}, contracted over axes "
            f"{[i - ndim for i in layer.axes]} in {layer.split} groups, which blocks of {block} do not tile; leave "
            "weigh out"
        )
