"""Gradients and the optimizer's moments in a few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jcompress import core, transforms
from jcompress.core import PyTree
from jcompress.formats import Quantized
from jcompress.formats.quantized import pool, spread
from jcompress.quantize.grids import positive
from jcompress.quantize.training.dorefa import rounded_at_random


class GradientsState(NamedTuple):
    """The steps taken and the key."""

    steps: jax.Array
    key: jax.Array

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Any]:
        """Nothing: the parameters are what the optimizer makes them."""
        return {}


def round_gradients(bits: int, key: jax.Array) -> optax.GradientTransformationExtraArgs:
    """Updates in a few bits, rounded at random, without bias: an optax transform, first in the chain.

    Each leaf has ``2**bits`` levels from ``-max |g|`` to ``max |g|``, and ``E Q(g) = g`` (Zhou et al. 2016,
    arXiv:1606.06160; stochastic rounding, Gupta et al. 2015, arXiv:1502.02551). For what is sent between devices, or
    for accelerators that compute in few bits.

    Args:
      bits: 1 to 8.
      key: for the rounding. Every step and every leaf draws from a key of its own.

    Returns:
      A ``GradientTransformationExtraArgs``; the dtypes of updates stay.

    Raises:
      ValueError: for bits outside 1 to 8.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jcompress as jc
      >>> tx = optax.chain(jc.quantize.round_gradients(2, jax.random.key(0)), optax.sgd(1.0))
      >>> grads = {"w": jnp.array([3.0, -3.0])}
      >>> tx.update(grads, tx.init(grads))[0]["w"].tolist()
      [-3.0, 3.0]
    """
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"round_gradients: bits={bits!r} is not an integer from 1 to 8")

    def init(params: PyTree) -> GradientsState:
        return GradientsState(transforms.steps(), transforms.copied(key))

    def update(
        updates: PyTree, state: GradientsState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, GradientsState]:
        now = jax.random.fold_in(state.key, state.steps)
        leaves, treedef = jax.tree.flatten(updates)
        rounded = [
            rounded_at_random(g, bits, jax.random.fold_in(now, i), tuple(range(g.ndim))) for i, g in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, rounded), GradientsState(optax.safe_increment(state.steps), state.key)

    return optax.GradientTransformationExtraArgs(init, update)


class Moment(NamedTuple):
    """A leaf of an optimizer's state between steps, on the levels of :func:`dynamic_levels`."""

    held: Quantized


class MomentsState(NamedTuple):
    """The optimizer's state with its large arrays as :class:`Moment`."""

    inner: PyTree

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Any]:
        """Nothing: it is the state that is small, not the parameters."""
        return {}


def moments(
    inner: optax.GradientTransformation,
    bits: int = 8,
    group_size: int = 256,
    *,
    smallest: int = 4096,
    squares: tuple[str, ...] = ("nu", "sum_of_squares", "v"),
) -> optax.GradientTransformationExtraArgs:
    """Any optimizer, with the large arrays of its state in a few bits between steps (Dettmers et al. 2022, 2110.02861).

    Dynamic tree quantization: an array is kept as the nearest of ``2**bits`` levels times the largest magnitude of its
    block, ``group_size`` rows of each column (the paper's blocks are 2048 entries in memory order). Each decade below
    the largest has half as many levels as the one above, so that at 8 bits entries down to a millionth of the largest
    are told apart. Means of squares have no sign, so they get twice the levels; a square that is not zero never becomes
    zero, which would make a step infinite. Changes of less than half a level are lost.

    At 8 bits Adam's state takes a quarter of its bytes: ``jc.nbits(state)`` counts them.

    Args:
      inner: the optimizer. Arrays of two axes or more in its state are kept so, whatever they are.
      bits: 2 to 8; 32 gives the optimizer as it is.
      group_size: rows of axis -2 that share a scale.
      smallest: arrays of fewer elements are left alone.
      squares: fields of the state that hold means or sums of squares.

    Returns:
      A ``GradientTransformationExtraArgs``, whose state has the optimizer's as ``.inner``.

    Raises:
      ValueError: for other bits, or a group size that is not positive.

    Example:
      >>> import jax.numpy as jnp, optax, jcompress as jc
      >>> params = {"w": jnp.ones((256, 16))}
      >>> plain, small = optax.adam(1e-3), jc.quantize.moments(optax.adam(1e-3))
      >>> jc.nbits(plain.init(params)) - 32, jc.nbits(small.init(params)) - 32
      (262144, 66560)
    """
    if not isinstance(bits, int) or not (2 <= bits <= 8 or bits == 32):
        raise ValueError(f"moments: bits={bits!r} is not an integer from 2 to 8, or 32")
    if core.is_concrete(group_size) and group_size < 1:
        raise ValueError(f"moments: group_size={group_size} must be positive")
    optimizer = optax.with_extra_args_support(inner)

    def packed(path: Any, x: Any) -> Any:
        floating = hasattr(x, "dtype") and x.dtype == jnp.float32
        if bits == 32 or not floating or x.ndim < 2 or x.size < smallest:
            return x
        return Moment(_encoded(x, bits, group_size, any(getattr(key, "name", None) in squares for key in path)))

    def pack(state: PyTree) -> MomentsState:
        return MomentsState(jax.tree_util.tree_map_with_path(packed, state))

    def init(params: PyTree) -> MomentsState:
        return pack(optimizer.init(params))

    def update(
        updates: PyTree, state: MomentsState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, MomentsState]:
        whole = jax.tree.map(_decoded, state.inner, is_leaf=lambda x: isinstance(x, Moment))
        updates, whole = optimizer.update(updates, whole, params, **extra)
        return updates, pack(whole)

    return optax.GradientTransformationExtraArgs(init, update)


def dynamic_levels(bits: int, square: bool) -> np.ndarray:
    """The levels of dynamic tree quantization, ascending: 0, 1, and in each decade midpoints of equal parts of it.

    The decade ``10**-i`` has ``2**(bits - 2 - i)`` parts, or with no sign twice as many; with a sign all but 1 have a
    negative as well.
    """
    found = [10.0**-i * (0.1 + 0.9 * (np.arange(n) + 0.5) / n) for i, n in enumerate(_parts(bits, square))]
    positive = np.concatenate(found[::-1])
    return np.concatenate([positive[:0] if square else -positive[::-1], [0.0], positive, [1.0]])


def _parts(bits: int, square: bool) -> list[int]:
    """How many levels each decade has, the highest first."""
    return [2 ** (bits - 2 - i + square) for i in range(bits - 1)]


def _encoded(x: jax.Array, bits: int, group_size: int, square: bool) -> Quantized:
    levels, parts = dynamic_levels(bits, square), _parts(bits, square)
    scale = positive(pool(jnp.abs(x), (-2,), group_size, jnp.maximum, 0.0))
    place = _places(jnp.abs(x) / spread(scale, x, group_size), levels[levels > 0], parts)
    if square:
        codes = jnp.where(x > 0, jnp.maximum(place, 1), 0)
    else:
        codes = jnp.where(x < 0, -jnp.minimum(place, sum(parts)), place) + sum(parts)
    table = tuple(map(float, levels))
    return Quantized(codes.astype(jnp.uint8), scale, bits=bits, table=table, group_size=group_size)


def _places(x: jax.Array, levels: np.ndarray, parts: list[int]) -> jax.Array:
    """The place of the positive level nearest to each x in [0, 1], from 1, or 0 where 0 is nearer: by arithmetic.

    Levels are even within a decade; where it begins is half way between its lowest level and the one below.
    """
    place, below = jnp.zeros(x.shape, jnp.int32), 0
    for i, n in reversed(list(enumerate(parts))):
        begin = (levels[below] + (levels[below - 1] if below else 0.0)) / 2
        step = jnp.floor((x * 10.0**i - 0.1) * (n / 0.9)).astype(jnp.int32)
        place = jnp.where(x >= begin, below + 1 + jnp.clip(step, 0, n - 1), place)
        below += n
    return jnp.where(x >= (levels[-1] + levels[-2]) / 2, below + 1, place)


def _decoded(x: Any) -> Any:
    return x.held.materialize() if isinstance(x, Moment) else x
