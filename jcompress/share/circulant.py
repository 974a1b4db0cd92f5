"""Circulant matrices, and matrices of circulant blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Gathered
from jcompress.share.hashed import check_hash


@dataclasses.dataclass(frozen=True)
class Circulant(Method):
    """The nearest circulant matrix, or one of circulant blocks (Cheng et al. 2015, arXiv:1502.03436).

    ``w[i, j] = values[(j - i) mod n]`` in each square block: the values are the means of its cyclic diagonals, the
    optimum of least squares, and ``x @ w`` takes ``n log n`` steps by Fourier transforms, as ``jc.accelerate`` makes
    it. Blocks are those of Ding et al. 2017, arXiv:1708.08917. Of a convolution each position of the window has blocks
    of its own.

    Attributes:
      block: the length of a block, which divides inputs and outputs. None for one circulant matrix of the larger of
        both, cut to the array's shape.
      seed: for ``D w`` in place of ``w``, with a random sign for each input, a function of the seed and its index.

    Raises:
      ValueError: for a block that does not tile the array, or an array that is no matrix.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.share.Circulant()(jnp.array([[1.0, 2.0], [4.0, 3.0]]))
      >>> node.materialize().tolist(), node.nbits()
      ([[2.0, 3.0], [3.0, 2.0]], 64)
    """

    block: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.block is not None and (not isinstance(self.block, (int, np.integer)) or self.block < 1):
            raise ValueError(f"Circulant: block={self.block!r} must be a positive integer, or None for one block")
        if self.seed is not None:
            check_hash("Circulant", 1.0, self.seed)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the blocks do not tile the array."""
        check_matrix("Circulant", path, shape)
        if self.block is not None and (shape[-2] % self.block or shape[-1] % self.block):
            raise ValueError(
                f"{path}: Circulant found block={self.block} for an array of shape {shape}; use a number that divides "
                "its inputs and outputs, or block=None"
            )

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Gathered:
        """The node for one array."""
        self.check(context.path, w.shape, w.dtype)
        block = max(*w.shape[-2:], 1) if self.block is None else int(self.block)
        return Gathered(None, w.shape, "circulant", (block,), self.seed).project(w, context.where)


def check_matrix(name: str, path: str, shape: tuple[int, ...]) -> None:
    """Raise for an array of fewer than two axes."""
    if len(shape) < 2:
        raise ValueError(f"{path}: {name} needs a matrix, found shape {shape}; leave it dense, with None in the plan")
