"""Every quantizer, and what is known of its grid from elsewhere. A new quantizer adds its row here."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from rows import statistics

import jcompress as jc

F, Q, T = jc.formats, jc.quantize, jc.quantize.training
SHAPE = (64, 6)
KEY = jax.random.key(3)


@dataclasses.dataclass(frozen=True)
class Row:
    """A quantizer and its grid.

    Attributes:
      method: the quantizer.
      levels: all that the scale multiplies, ascending; or a function of the node that gives all values (n, *SHAPE);
        None for an affine grid.
      bits: bits of a code.
      scale_bits: bits of all scales and zero points of an array of shape ``SHAPE``.
      gaps: how many gaps between levels a weight inside the range moves at most; None where it makes up for others.
      own: whether its codes are those that its scales give each weight by itself.
      again: whether the method leaves what it gave as it is; else its scales do, and are fitted anew.
    """

    method: Any
    levels: np.ndarray | Callable | None
    bits: int
    scale_bits: int
    gaps: float | None = 0.5
    own: bool = True
    again: bool = True


def integers(most):
    return np.arange(-most, most + 1)


def signed(magnitudes):
    return np.unique([0, *magnitudes, *(-m for m in magnitudes)])


def floats(dtype, most):
    """All finite numbers of a float with a sign, by its fields."""
    found = ml_dtypes.finfo(dtype)
    bias, fraction = 1 - int(np.log2(float(found.smallest_normal))), 2**found.nmant
    fields = [
        (e + f / fraction) * 2.0 ** (1 - bias) if e == 0 else (1 + f / fraction) * 2.0 ** (e - bias)
        for e, f in itertools.product(range(2 ** (found.bits - 1 - found.nmant)), range(fraction))
    ]
    return signed([x for x in fields if x <= most])


# Dettmers et al. 2023, arXiv:2305.14314, appendix E.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
E4M3, E5M2, E2M3, E3M2, E2M1 = (
    floats(d, m)
    for d, m in (
        (ml_dtypes.float8_e4m3fn, 448),
        (ml_dtypes.float8_e5m2, 57344),
        (ml_dtypes.float6_e2m3fn, 7.5),
        (ml_dtypes.float6_e3m2fn, 28),
        (ml_dtypes.float4_e2m1fn, 6),
    )
)
POWERS, SIGNS = signed(2.0 ** -np.arange(7)), np.array([-1, 1])
FIXED = Q.Int(4, axis=None, clip=Q.ranges.Fixed(None, 2.0))
SWEPT: dict[str, Any] = {"gaps": None, "own": False}


def squeezed(node):
    """All values of an array of shifted and squeezed floats."""
    scale, power = (np.asarray(jc.core.dense(x), np.float64) for x in (node.scale, node.power))
    codes = E5M2[:, None, None]
    return np.broadcast_to(scale * np.sign(codes) * np.abs(codes / 2.0**15) ** power, (codes.size, *SHAPE))


def two_levels(node):
    return np.broadcast_to(np.array([-node.negative[0, 0], 0, node.positive[0, 0]])[:, None, None], (3, *SHAPE))


def neighbours(dtype):
    """Of the floats of 16 bits, those about each weight."""
    every = floats(dtype, 8)
    place = np.searchsorted(every, np.asarray(weights(), np.float64))
    return np.stack([every[place + i] for i in range(-2, 2)])


def weights(shape=SHAPE, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


ROWS = {
    "int8": Row(Q.Int(8), integers(127), 8, 6 * 32),
    "int4-group": Row(Q.Int(4, group_size=16), integers(7), 4, 24 * 32),
    "int2": Row(Q.Int(2, axis=None), integers(1), 2, 32),
    "int1": Row(Q.Int(1), SIGNS, 1, 6 * 32),
    "int3-mse": Row(Q.Int(3, clip="mse"), integers(3), 3, 6 * 32, again=False),
    "int4-percentile": Row(Q.Int(4, clip=Q.ranges.Percentile(90.0)), integers(7), 4, 6 * 32, again=False),
    "int8-affine": Row(Q.Int(8, symmetric=False), None, 8, 6 * 40),
    "int3-affine-group": Row(Q.Int(3, 16, symmetric=False), None, 3, 24 * 35),
    "int1-affine": Row(Q.Int(1, symmetric=False), None, 1, 6 * 33, again=False),
    "int4-power-of-two": Row(Q.Int(4, power_of_two=True), integers(7), 4, 6 * 8),
    "fixed-point": Row(Q.FixedPoint(6, fraction=3), integers(31), 6, 8),
    "float8-e4m3": Row(Q.Float8(), E4M3, 8, 6 * 32),
    "float8-e5m2": Row(Q.Float8("e5m2", group_size=32), E5M2, 8, 12 * 32),
    "float4": Row(Q.Float4(group_size=16), E2M1, 4, 24 * 32),
    "mxfp8-e4m3": Row(Q.Microscaling("e4m3"), E4M3, 8, 12 * 8),
    "mxfp8-e5m2": Row(Q.Microscaling("e5m2"), E5M2, 8, 12 * 8),
    "mxfp6-e2m3": Row(Q.Microscaling("e2m3"), E2M3, 6, 12 * 8),
    "mxfp6-e3m2": Row(Q.Microscaling("e3m2"), E3M2, 6, 12 * 8),
    "mxfp4": Row(Q.Microscaling("e2m1"), E2M1, 4, 12 * 8),
    "mxint8": Row(Q.Microscaling("int8"), integers(127), 8, 12 * 8),
    "nvfp4": Row(Q.NVFP4(), E2M1, 4, 24 * 8 + 32),
    "s2fp8": Row(Q.S2FP8(), squeezed, 8, 64, gaps=1, again=False),
    "nf4": Row(Q.NF4(), NF4, 4, 6 * 32),
    "powers-of-two": Row(Q.PowersOfTwo(4), POWERS, 4, 6 * 8),
    "powers-of-two-inq": Row(Q.PowersOfTwo(5, magnitudes=8), signed(2.0 ** -np.arange(8)), 5, 6 * 8),
    "additive-powers-of-two": Row(
        Q.AdditivePowersOfTwo(5),
        signed([a + b for a in (0, 1, 1 / 4, 1 / 16) for b in (0, 1 / 2, 1 / 8, 1 / 32) if a + b]),
        5,
        6 * 32,
    ),
    "table": Row(Q.Table((0, 1, -2, 0.5)), np.array([-2, 0, 0.5, 1]), 2, 6 * 32),
    "ternary": Row(Q.Ternary(), integers(1), 2, 6 * 32, gaps=1, own=False),
    "ternary-optimal": Row(Q.Ternary("optimal"), integers(1), 2, 6 * 32),
    "int4-double": Row(
        jc.chain(Q.Int(4, group_size=8), Q.Int(8)), integers(7), 4, 48 * 8 + 6 * 32, gaps=1, own=False, again=False
    ),
    "bfloat16": Row(Q.Float(), lambda _: neighbours(ml_dtypes.bfloat16), 16, 0),
    "float16": Row(Q.Float("float16"), lambda _: neighbours(np.float16), 16, 0),
    "stochastic": Row(Q.Stochastic(Q.Int(4)), integers(7), 4, 6 * 32, gaps=1, own=False),
    "hqq": Row(Q.HQQ(3, 16), None, 3, 24 * 48, again=False),
    "abc-net": Row(Q.ABCNet(2), SIGNS, 1, 6 * 32, **SWEPT, again=False),
    "lab": Row(Q.LAB(), SIGNS, 1, 6 * 32),
    "gptq": Row(Q.GPTQ(grid=FIXED), integers(7), 4, 32, **SWEPT),
    "gptq-ordered": Row(Q.GPTQ(grid=FIXED, order=True), integers(7), 4, 32, **SWEPT),
    "gpfq": Row(Q.GPFQ(4, axis=None, clip=FIXED.clip), integers(7), 4, 32, **SWEPT),
    "spfq": Row(Q.GPFQ(4, axis=None, clip=FIXED.clip, stochastic=True), integers(7), 4, 32, **SWEPT),
    "adaround": Row(Q.AdaRound(4, clip=FIXED.clip, steps=20), integers(7), 4, 6 * 32, gaps=1, own=False),
    "awq": Row(Q.AWQ(FIXED, points=3), integers(7), 4, 32, **SWEPT),
    "rotation": Row(Q.Rotation(FIXED), integers(7), 4, 32, **SWEPT),
    "lqer": Row(Q.LQER(2, Q.Int(3)), integers(3), 3, 6 * 32, **SWEPT, again=False),
    "inq": Row(Q.INQ(jc.prune.Magnitude(sparsity=0.5), Q.PowersOfTwo(4)), POWERS, 4, 6 * 8, **SWEPT),
    "lsq": Row(T.LSQ(4), np.arange(-8, 8), 4, 6 * 32, again=False),
    "dsq": Row(T.DSQ(3), np.arange(-4, 4), 3, 6 * 32, again=False),
    "dorefa": Row(T.DoReFa(3), np.arange(-7, 8, 2), 3, 32, **SWEPT),
    "binary-connect": Row(T.BinaryConnect(), SIGNS, 1, 6 * 32),
    "ttq": Row(T.TTQ(), two_levels, 2, 3 * 32, gaps=1),
    "quant-noise": Row(T.QuantNoise(Q.Int(4), 0.5), integers(7), 4, 6 * 32, **SWEPT, again=False),
    "relaxed": Row(T.Relaxed(4, slack=0.0), integers(7), 4, 6 * 32),
}  # fmt: skip


def context(**known):
    return jc.Context(key=KEY, stats=statistics(SHAPE), **known)


@functools.cache
def quantizer(name):
    """Compiled, which takes less time than the compilation of each of its operations."""
    return jax.jit(lambda w, **known: ROWS[name].method(w, context(**known)))


@functools.cache
def fitted(name):
    return quantizer(name)(weights())


def codes(node):
    """The part of a node that holds codes, in its storage form where that rounds in the same way."""
    if isinstance(node, (F.Rotated, F.Rescaled, F.Masked)):
        return codes(node.values)
    if isinstance(node, F.Sum):
        return codes(node.terms[0])
    finished = isinstance(node, F.Binarized) or (isinstance(node, F.FakeQuantized) and node.surrogate == "tanh")
    return jc.finalize(node) if finished else node


def rounded(node, w):
    """What the grid of a node, its scales as they are, makes of each weight by itself."""
    if isinstance(node, (F.FakeQuantized, F.Ternarized)):
        return dataclasses.replace(node, values=w).materialize()
    return (node.project(w) if isinstance(node, F.Cast) else node.encode(w)).materialize()


def scales(node, shape=SHAPE, field="scale"):
    """The scale of each entry, float64."""
    scale = np.asarray(jc.core.dense(getattr(node, field)).astype(jnp.float32), np.float64)
    if node.group_size is not None:
        scale = np.repeat(scale, node.group_size, axis=-2)[..., : shape[-2], :]
    return np.broadcast_to(scale, shape)


def values(name, node):
    """All values that each entry may take, (n, *SHAPE), ascending."""
    levels = ROWS[name].levels
    if callable(levels):
        return np.sort(levels(node), 0)
    if levels is None:
        levels = np.arange(2**node.bits)[:, None, None] - scales(node, field="zero")
    else:
        levels = levels[:, None, None]
    return levels * scales(node)
