"""Diagonals between fast transforms: Adaptive Fastfood and ACDC."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import FastProduct
from jcompress.numeric import hashing
from jcompress.share.hashed import check_hash
from jcompress.share.toeplitz import check_sweeps, fitted, length_of

_FASTFOOD = ("diagonal", "hadamard", "permutation", "diagonal", "hadamard", "diagonal")


@dataclasses.dataclass(frozen=True)
class Fastfood(Method):
    """Three trained diagonals between Hadamard transforms: Adaptive Fastfood (Yang et al. 2015, arXiv:1412.7149).

    ``w = B H P G H S`` with ``H`` orthonormal, for ``x @ w``; ``P`` is a random permutation, a function of the seed.
    It has the least power of two that both sides fit into, and is cut to the array's shape. The diagonals start from
    random signs and are fitted by alternating least squares, which finds a stationary point: 3 n numbers hold little of
    a trained matrix, so train them, or train them from the start.

    Its transforms run along whole axes, so a sharded array is gathered.

    Attributes:
      seed: of the permutation and the signs.
      sweeps: of alternating least squares.

    Raises:
      ValueError: for an array that is no matrix, or a seed that is none.

    Example:
      >>> import jax, jcompress as jc
      >>> node = jc.share.Fastfood()(jax.random.normal(jax.random.key(0), (64, 48)))
      >>> node.shape, node.nbits() == 3 * 64 * 32
      ((64, 48), True)
    """

    seed: int = 0
    sweeps: int = 3

    def __post_init__(self) -> None:
        check_hash("Fastfood", 1.0, self.seed)
        check_sweeps("Fastfood", self.sweeps)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise for an array that is no matrix."""
        length_of("Fastfood", path, shape)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> FastProduct:
        """The node for one array."""
        n = 1 << (length_of("Fastfood", context.path, w.shape) - 1).bit_length()
        return fitted(w, context, _signs(self.seed, n, 3), _FASTFOOD, self.sweeps, self.seed)


@dataclasses.dataclass(frozen=True)
class ACDC(Method):
    """Diagonals of entries and of cosine frequencies in turns (Moczulski et al. 2016, arXiv:1511.05946).

    ``w = A_1 C D_1 C^-1 P A_2 C D_2 C^-1 ...`` for ``x @ w``, ``C`` the orthonormal cosine transform and ``P`` a random
    permutation between layers, a function of the seed. It has the length of the longer side, and is cut to the array's
    shape. The diagonals start from random signs and are fitted by alternating least squares, which finds a stationary
    point: a layer's 2 n numbers hold little of a trained matrix, so train them, or train them from the start.

    Its transforms run along whole axes, so a sharded array is gathered.

    Attributes:
      layers: how many pairs of diagonals.
      seed: of the permutations and the signs.
      sweeps: of alternating least squares.

    Raises:
      ValueError: for fewer than one layer, an array that is no matrix, or a seed that is none.

    Example:
      >>> import jax, jcompress as jc
      >>> node = jc.share.ACDC(layers=2)(jax.random.normal(jax.random.key(0), (64, 48)))
      >>> node.shape, node.nbits() == 2 * 2 * 64 * 32
      ((64, 48), True)
    """

    layers: int = 1
    seed: int = 0
    sweeps: int = 3

    def __post_init__(self) -> None:
        check_hash("ACDC", 1.0, self.seed)
        check_sweeps("ACDC", self.sweeps)
        if not isinstance(self.layers, (int, np.integer)) or self.layers < 1:
            raise ValueError(f"ACDC: layers={self.layers!r} must be a positive integer")

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise for an array that is no matrix."""
        length_of("ACDC", path, shape)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> FastProduct:
        """The node for one array."""
        n = length_of("ACDC", context.path, w.shape)
        layer = ("diagonal", "cosine", "diagonal", "back")
        steps = layer + (self.layers - 1) * ("permutation", *layer)
        return fitted(w, context, _signs(self.seed, n, 2 * self.layers), steps, self.sweeps, self.seed)


def _signs(seed: int, n: int, count: int) -> tuple[jax.Array, ...]:
    """Random signs, float32 (n, 1) each."""
    minus = hashing.minuses(hashing.hashes(seed, (count, n)))
    return tuple(jnp.where(row, -1.0, 1.0)[:, None] for row in minus)
