"""Patterns that a mask must follow."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jcompress.numeric.counting import ordered_bits


class Pattern(Protocol):
    """What a mask must follow: which weights are decided together, and how, where the pattern says that too."""

    @property
    def sparsity(self) -> float | None:
        """The fraction of zeros that the pattern fixes; None if it leaves that open."""

    def check(self, path: str, shape: tuple[int, ...]) -> None:
        """Raise if an array of this shape cannot follow the pattern."""

    def unit(self, shape: tuple[int, ...]) -> int:
        """How many weights are decided together."""

    def units(self, scores: jax.Array) -> jax.Array:
        """One score for all weights that are decided together."""

    def mask(self, units: jax.Array) -> jax.Array:
        """Which units stay, where the pattern fixes the sparsity."""

    def spread(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The mask of an array of this shape, given that of its units."""


@dataclasses.dataclass(frozen=True)
class NM:
    """Keep the ``n`` largest of every ``m`` along the contraction axis (-2 of an (in, out) kernel).

    The pattern fixes the sparsity at ``1 - n / m``. Hardware knows 2:4 (Mishra et al. 2021, arXiv:2104.08378); any
    ``0 <= n <= m`` works here. Ties go to the lower index.

    Attributes:
      n: how many are kept.
      m: of how many.

    Raises:
      ValueError: unless ``0 <= n <= m`` and ``m >= 1``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.prune.NM(2, 4).mask(jnp.array([[1.0], [4.0], [3.0], [2.0]])).ravel().tolist()
      [False, True, True, False]
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 <= self.n <= self.m or self.m < 1:
            raise ValueError(f"NM: found n={self.n}, m={self.m}; expected 0 <= n <= m and m >= 1")

    @property
    def sparsity(self) -> float:
        """The fraction of zeros that the pattern fixes."""
        return 1 - self.n / self.m

    def check(self, path: str, shape: tuple[int, ...]) -> None:
        """Raise if an array of this shape cannot follow the pattern."""
        if len(shape) < 2 or shape[-2] % self.m:
            found = f"axis -2 of length {shape[-2]}" if len(shape) > 1 else f"shape {shape} without axis -2"
            raise ValueError(
                f"{path}: {self} needs axis -2 in groups of {self.m}, found {found}; choose another m or keep it dense"
            )

    def unit(self, shape: tuple[int, ...]) -> int:
        """Weights are decided one by one."""
        return 1

    def units(self, scores: jax.Array) -> jax.Array:
        """The scores themselves."""
        return scores

    def spread(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The mask itself."""
        return mask

    def mask(self, scores: jax.Array) -> jax.Array:
        """Mask of the shape of ``scores`` (..., in, out). Ranks come from pairwise comparisons, not from a sort."""
        return _largest_of_each(scores, self.n, self.m)


@functools.partial(jax.jit, static_argnames=("n", "m"))
def _largest_of_each(scores: jax.Array, n: int, m: int) -> jax.Array:
    """Compiled, also where it is called outside ``jit``: its steps take several times the memory."""
    *lead, rows, columns = scores.shape
    groups = ordered_bits(scores).reshape(*lead, rows // m, m, columns)
    place = lax.broadcasted_iota(jnp.int32, groups.shape, groups.ndim - 2)
    rank = jnp.zeros(groups.shape, jnp.int8 if m < 128 else jnp.int32)
    for i in range(m):
        # Integers: that an equal one in front counts as larger is to add 1, for which they leave room.
        ahead = groups[..., i : i + 1, :] + (place > i).astype(groups.dtype) > groups
        rank = rank + ahead.astype(rank.dtype)
    return (rank < n).reshape(scores.shape)


@dataclasses.dataclass(frozen=True)
class Block:
    """Keep or cut whole blocks, ranked by the mean score of their weights.

    The number of blocks kept is exact, ``n - round(sparsity * n)`` of ``n``. A shape with ``None`` takes the whole
    axis: of an (in, out) kernel, ``Block((None, 1))`` cuts columns (output units) and ``Block((1, None))`` rows (input
    units); of a convolution, ``Block((None, None, None, 1))`` cuts filters. Kernels of structured sparsity as in Gray
    et al. 2017 and Narang et al. 2017, arXiv:1711.02782.

    With a scope of all leaves, blocks compete by their means and the count is that of blocks.

    Attributes:
      shape: the block's size along the last axes; it must divide them. Further axes in front are of size 1.

    Raises:
      ValueError: for a size that is not positive.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.array([[1.0, 1.0, 9.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
      >>> jc.prune.Magnitude(sparsity=0.5, pattern=jc.prune.Block((2, 2)))(w).mask[0].tolist()
      [False, False, True, True]
      >>> jc.prune.Magnitude(sparsity=0.75, pattern=jc.prune.Block((None, 1)))(w).mask[1].tolist()
      [False, False, True, False]
    """

    shape: tuple[int | None, ...]

    def __post_init__(self) -> None:
        sizes = [n for n in self.shape if n is not None]
        if not self.shape or any(n < 1 for n in sizes):
            raise ValueError(f"Block: found shape={self.shape}; expected a positive size, or None, for each axis")

    @property
    def sparsity(self) -> None:
        """The pattern leaves the fraction of zeros open."""
        return None

    def _sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        lead = len(shape) - len(self.shape)
        trailing = zip(self.shape, shape[lead:], strict=True)
        return (*[1] * lead, *(n if b is None else b for b, n in trailing))

    def check(self, path: str, shape: tuple[int, ...]) -> None:
        """Raise if an array of this shape cannot follow the pattern."""
        if len(self.shape) > len(shape):
            raise ValueError(
                f"{path}: {self} needs {len(self.shape)} axes, found shape {shape}; give a block of fewer axes or keep "
                "it dense"
            )
        for axis, (b, n) in enumerate(zip(self._sizes(shape), shape, strict=True)):
            if n and n % b:
                raise ValueError(
                    f"{path}: {self} needs axis {axis - len(shape)} in blocks of {b}, found length {n}; choose a size "
                    "that divides it or keep it dense"
                )

    def unit(self, shape: tuple[int, ...]) -> int:
        """The number of weights in a block."""
        return math.prod(self._sizes(shape))

    def units(self, scores: jax.Array) -> jax.Array:
        """The mean score of each block; entries of score -inf count only where the whole block is such."""
        sizes = self._sizes(scores.shape)
        split = scores.astype(jnp.float32).reshape(
            [k for b, n in zip(sizes, scores.shape, strict=True) for k in (n // max(b, 1), b)]
        )
        within = tuple(range(1, split.ndim, 2))
        hidden = jnp.isneginf(split)
        mean = jnp.mean(jnp.where(hidden, 0, split), axis=within)
        return jnp.where(jnp.all(hidden, axis=within), -jnp.inf, mean)

    def mask(self, units: jax.Array) -> jax.Array:
        """The pattern leaves the number of blocks open, so it has no mask of its own."""
        raise ValueError(f"{self} fixes no sparsity; pass sparsity= beside it")

    def spread(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The mask of the weights, given that of the blocks."""
        sizes = self._sizes(shape)
        mask = jnp.expand_dims(mask, range(1, 2 * mask.ndim, 2))
        return jnp.broadcast_to(mask, [k for n, b in zip(mask.shape[::2], sizes, strict=True) for k in (n, b)]).reshape(
            shape
        )


@dataclasses.dataclass(frozen=True)
class Shared:
    """One decision for all leaves of the rule: they get the same mask, by the sum of their scores.

    For leaves that are cut together, such as the two kernels of a gated layer, or queries and keys. Ties, counts and
    order are those of the pattern inside.

    Attributes:
      pattern: what the shared mask must follow, :class:`NM` or :class:`Block`, or None for single weights. Leaves must
        have as many blocks, along each axis, as one another: with ``Block((None, 1))`` the same number of columns.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"gate": jnp.array([[3.0, 1.0]]), "up": jnp.array([[1.0, 4.0], [0.0, 6.0]])}
      >>> method = jc.prune.Magnitude(sparsity=0.5, pattern=jc.prune.Shared(jc.prune.Block((None, 1))))
      >>> small = jc.compress(params, jc.plan(params, [(".*", method)]))
      >>> small["gate"].mask.tolist(), small["up"].mask.tolist()
      ([[False, True]], [[False, True], [False, True]])
    """

    pattern: NM | Block | None = None

    @property
    def sparsity(self) -> float | None:
        """What the pattern inside fixes."""
        return None if self.pattern is None else self.pattern.sparsity

    def check(self, path: str, shape: tuple[int, ...]) -> None:
        """Raise if an array of this shape cannot follow the pattern inside."""
        if self.pattern is not None:
            self.pattern.check(path, shape)

    def unit(self, shape: tuple[int, ...]) -> int:
        """How many weights of this leaf are decided together."""
        return 1 if self.pattern is None else self.pattern.unit(shape)

    def units(self, scores: jax.Array) -> jax.Array:
        """The units of the pattern inside."""
        return scores if self.pattern is None else self.pattern.units(scores)

    def mask(self, units: jax.Array) -> jax.Array:
        """Which units stay, where the pattern inside fixes the sparsity."""
        if self.pattern is None:
            raise ValueError(f"{self} fixes no sparsity; pass sparsity= beside it")
        return self.pattern.mask(units)

    def spread(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The mask of a leaf, given that of the units."""
        return mask if self.pattern is None else self.pattern.spread(mask, shape)
