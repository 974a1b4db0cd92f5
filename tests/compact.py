"""The compact filters, one row each: a layer, what it must equal, its numbers and its multiply-adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jcompress import nn

SIDE = 6
PLACES = 2 * SIDE * SIDE


@dataclasses.dataclass(frozen=True)
class Row:
    """A module that reads (2, side, side, inputs).

    Attributes:
      build: ``build(rngs)``.
      inputs: channels that come.
      numbers: of its parameters, by the formula of its docstring.
      multiply_adds: of its parameters with activations; None where products of transforms are counted elsewhere.
      front: acts on the images before.
      shape: of what goes, behind the batch.
      reason: why ``calibrate`` gives no statistics of its kernel, where it does not.
      cut: the groups of units that can be cut inside.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    numbers: int
    multiply_adds: int | None
    shape: tuple[int, ...]
    inputs: int = 4
    front: Callable[[Any], Any] = lambda x: x
    reason: str = ""
    cut: tuple[str, ...] = ()


ROWS = {
    "LiftConv p4": Row(
        lambda r: nn.LiftConv(4, 6, 3, rngs=r), 9 * 24 + 6, 4 * PLACES * 9 * 24, (SIDE, SIDE, 4, 6), reason="stack"
    ),
    "LiftConv p4m": Row(
        lambda r: nn.LiftConv(4, 6, 3, group="p4m", rngs=r),
        9 * 24 + 6,
        8 * PLACES * 9 * 24,
        (SIDE, SIDE, 8, 6),
        reason="stack",
    ),
    "GroupConv p4": Row(
        lambda r: nn.GroupConv(4, 6, 3, rngs=r),
        4 * 9 * 24 + 6,
        16 * PLACES * 9 * 24,
        (SIDE, SIDE, 4, 6),
        front=lambda x: jnp.stack([x, 2 * x, -x, x + 1], -2),
        reason="stack",
    ),
    "CyclicConv": Row(
        lambda r: nn.CyclicConv(4, 8, 3, rngs=r), 9 * 8 + 2, 4 * PLACES * 9 * 8, (SIDE, SIDE, 8), front=nn.cyclic_slice
    ),
    "CReLUConv": Row(lambda r: nn.CReLUConv(4, 8, 3, rngs=r), 9 * 16 + 4, PLACES * 9 * 16, (SIDE, SIDE, 8)),
    "MultiBias": Row(lambda r: nn.MultiBias(4, 3, rngs=r), 12, 0, (SIDE, SIDE, 12), reason="in no product"),
    "DoublyConv": Row(
        lambda r: nn.DoublyConv(4, 8, 3, meta_size=4, rngs=r),
        16 * 4 * 2 + 8,
        PLACES * 9 * 32,
        (SIDE, SIDE, 8),
        reason="a part of its axis",
    ),
    "DoublyConv pool": Row(
        lambda r: nn.DoublyConv(4, 8, 3, meta_size=6, pool=2, rngs=r),
        36 * 4 * 2 + 8,
        PLACES * 9 * 4 * 32,
        (SIDE, SIDE, 8),
        reason="a part of its axis",
    ),
    "Fire": Row(
        lambda r: nn.Fire(4, 8, 3, rngs=r),
        12 + 12 * 10 + 11,
        PLACES * (12 + 12 * 10),
        (SIDE, SIDE, 8),
        cut=("squeeze/kernel[3]",),
    ),
    "DepthwiseSeparable": Row(
        lambda r: nn.DepthwiseSeparable(4, 6, multiplier=2, rngs=r),
        72 + 48 + 6,
        PLACES * (72 + 48),
        (SIDE, SIDE, 6),
        cut=("depthwise[3].1",),
    ),
    "GroupedConv": Row(lambda r: nn.GroupedConv(4, 8, groups=2, rngs=r), 9 * 16 + 8, PLACES * 9 * 16, (SIDE, SIDE, 8)),
    "SplitRecurrentConv": Row(
        lambda r: nn.SplitRecurrentConv(4, 6, splits=2, rngs=r),
        9 * (4 + 6) * 6 // 4 + 3 + 2,
        PLACES * 9 * (4 * 6 // 2 + 9),
        (SIDE, SIDE, 6),
    ),
    "SqueezeExcite": Row(
        lambda r: nn.SqueezeExcite(4, 2, rngs=r), 16 + 6, 2 * 16, (SIDE, SIDE, 4), cut=("squeeze/kernel[1]",)
    ),
    "InvertedResidual": Row(
        lambda r: nn.InvertedResidual(4, 4, 3, rngs=r),
        48 + 9 * 12 + 48 + 28,
        PLACES * (48 + 9 * 12 + 48),
        (SIDE, SIDE, 4),
        cut=("depthwise/kernel[3]",),
    ),
    "WinogradConv": Row(
        lambda r: nn.WinogradConv(4, 6, rngs=r), 9 * 24 + 6, PLACES * 4 * 24, (SIDE, SIDE, 6), reason="sub"
    ),
    "FFTConv": Row(lambda r: nn.FFTConv(4, 6, (5, 5), rngs=r), 25 * 24 + 6, None, (SIDE, SIDE, 6), reason="pad"),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def built(row, seed=0):
    """A function of the state and images, and a state in which every number is random."""
    graph, state = nnx.split(row.build(nnx.Rngs(seed)))
    leaves, tree = jax.tree.flatten(state)
    drawn = [normal(i + 10, *x.shape) * (0.3 if x.ndim > 1 else 0.5) for i, x in enumerate(leaves)]
    return lambda state, x: nnx.merge(graph, state)(row.front(x)), tree.unflatten(drawn)
