"""Ranks that depend on the values: by the part of the squared norm that is kept, by an error bound, or by evidence."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.factorize.subspaces import check_rank
from jcompress.numeric import scaling

EVBMF = "evbmf"


@dataclasses.dataclass(frozen=True)
class Choice:
    """How ranks follow from singular values.

    Attributes:
      left: the part of the squared norm that may be left out; None for that of most evidence.
    """

    left: float | None

    @classmethod
    def of(cls, name: str, rank: Any, energy: float | None, tolerance: float | None) -> Choice | None:
        """From the attributes of a method; None where the rank is given.

        Raises:
          ValueError: unless exactly one of them is given and has a meaning.
        """
        if sum(x is not None for x in (rank, energy, tolerance)) != 1:
            raise ValueError(f"{name} needs a rank, an energy or a tolerance, one of them")
        if energy is not None and not 0 < energy <= 1:
            raise ValueError(
                f"{name}: energy={energy} is outside (0, 1]; it is the part of the squared singular values kept"
            )
        if tolerance is not None and not 0 < tolerance < 1:
            raise ValueError(f"{name}: tolerance={tolerance} is outside (0, 1); it is a relative error")
        if isinstance(rank, str) and rank != EVBMF:
            raise ValueError(f"{name}: rank={rank!r} is unknown; use {EVBMF!r}, a whole number or a share")
        if rank is not None and rank != EVBMF:
            for r in rank if isinstance(rank, tuple) else (rank,):
                check_rank(name, r)
            return None
        if rank == EVBMF:
            return cls(None)
        # Of all the squared norm what is more than the rounding of float32.
        return cls(tolerance**2 if tolerance is not None else 1 - (energy or 1) * (1 - 1e-6))

    def rank(self, values: np.ndarray, shape: tuple[int, ...], steps: int = 1, norm: float | None = None) -> int:
        """The rank of a matrix.

        Args:
          values: all its singular values, falling.
          shape: of the matrix.
          steps: how many truncations share what may be left out.
          norm: the squared norm that this is a part of; by default that of the values.
        """
        values = np.asarray(values, np.float64)
        if self.left is None:
            return evbmf(values, shape)
        squares = values**2
        limit = self.left / steps * (squares.sum() if norm is None else norm)
        tails = np.cumsum(squares[::-1])[::-1]
        return max(1, int((tails > limit).sum()))


def singular_values(matrix: jax.Array) -> np.ndarray:
    """Those of a matrix, or of stacked ones, on the host."""
    return np.asarray(jnp.linalg.svd(scaling.unit([matrix]).divide(matrix), compute_uv=False), np.float64)


def check_concrete(name: str, path: str, w: jax.Array) -> None:
    """Raise under ``jit``, where values are not known."""
    if not core.is_concrete(w):
        raise ValueError(f"{path}: {name} chooses its rank by the values, so it works outside jit only; give a rank")


def check_on_host(name: str, path: str, what: str, w: jax.Array) -> None:
    """Raise under ``jit`` and ``vmap`` for a method that computes on the host."""
    if not core.is_concrete(w):
        raise ValueError(
            f"{path}: {name} chooses its {what} by the values, so it works outside jit only; layers are stacked by a "
            "layout, jc.plan(..., layout=), and not by jc.stacked"
        )


def evbmf(values: Any, shape: tuple[int, ...]) -> int:
    """The rank of most evidence for a matrix in noise of unknown size, at least 1.

    The global solution of empirical variational Bayes matrix factorization is closed: it keeps the singular values
    above a limit that depends on the noise alone, whose variance is found by a search along one dimension (Nakajima,
    Sugiyama, Babacan & Tomioka 2013, JMLR 14; for layers Kim et al. 2016, arXiv:1511.06530).

    Args:
      values: (n,), all singular values, falling.
      shape: of the matrix.

    Returns:
      How many singular values are kept.

    Example:
      >>> import numpy as np, jcompress as jc
      >>> rng = np.random.default_rng(0)
      >>> w = rng.normal(size=(80, 3)) @ rng.normal(size=(3, 60)) + 0.1 * rng.normal(size=(80, 60))
      >>> jc.factorize.evbmf(np.linalg.svd(w, compute_uv=False), w.shape)
      3
    """
    short, long = min(shape), max(shape)
    values = np.asarray(values, np.float64)[:short]
    if not values.size or not values[0] > 0:
        return 1
    # Below the rounding of float32 no value is told from noise; with a floor a matrix without noise has its own rank.
    squares = np.maximum(values / values[0], 1e-6) ** 2
    ratio = short / long
    tau = 2.5129 * math.sqrt(ratio)
    limit = (1 + tau) * (1 + ratio / tau)

    def energy(variance: float) -> float:
        """The free energy at a variance of the noise, less what does not depend on it."""
        x = squares / (long * variance)
        kept = x[x > limit]
        shift = kept - (1 + ratio)
        found = 0.5 * (shift + np.sqrt(np.maximum(shift**2 - 4 * ratio, 0)))
        rest = x[x <= limit]
        return float(
            np.sum(rest - np.log(rest))
            + np.sum(kept - found + np.log((found + 1) / kept) + ratio * np.log(found / ratio + 1))
        )

    most = min(math.ceil(short / (1 + ratio)) - 1, short - 1)
    low = max(squares[most] / (long * limit), squares[most:].mean() / long)
    high = squares.sum() / (short * long)
    return max(1, int((squares > long * _least(energy, low, max(high, low)) * limit).sum()))


def _least(function: Any, low: float, high: float, points: int = 128, rounds: int = 4) -> float:
    """Where a function of a positive number is least, by finer and finer grids."""
    for _ in range(rounds):
        grid = np.geomspace(low, high, points)
        best = int(np.argmin([function(x) for x in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, points - 1)]
    return float(grid[best])
