"""Products of small matrices with structure: Kronecker and Monarch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from jcompress import core
from jcompress.core import Context, Method
from jcompress.factorize.subspaces import check_filled, check_rank, is_share, largest
from jcompress.formats.lowrank import truncated_svd
from jcompress.formats.network import TensorNetwork

_WINDOW = "uvwxyz"


@dataclasses.dataclass(frozen=True)
class Kronecker(Method):
    """The nearest sum of Kronecker products ``sum_t A_t (x) B_t`` (Van Loan & Pitsianis 1993).

    The blocks of the matrix, each a row, are a matrix whose best approximation of low rank it is. The window of a
    convolution goes to ``B``. Gathers a sharded matrix, once.

    Attributes:
      shape: of ``A``: how many of the (inputs, outputs) are its; those of ``B`` are what is left.
      terms: how many products, or the share of the numbers that is kept, in (0, 1).

    Raises:
      ValueError: for a shape that does not divide the axes, or more terms than there can be.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.kron(jnp.array([[1.0, 2.0]]), jnp.array([[1.0], [10.0]]))
      >>> node = jc.factorize.Kronecker(shape=(1, 2))(w)
      >>> node.materialize().round(3).tolist(), node.nbits()
      ([[1.0, 2.0], [10.0, 20.0]], 128)
    """

    shape: tuple[int, int]
    terms: int | float = 1

    def __post_init__(self) -> None:
        check_rank("Kronecker", self.terms)
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"Kronecker: shape={self.shape} must be two positive numbers")

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the shape does not divide the axes."""
        self._sizes(path, shape)

    def _sizes(self, path: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Numbers in ``A``, in ``B``, and the terms."""
        check_filled("Kronecker", path, shape)
        if len(shape) < 2 or shape[-2] % self.shape[0] or shape[-1] % self.shape[1]:
            raise ValueError(
                f"{path}: Kronecker found shape={self.shape} for an array of shape {shape}; use numbers that divide "
                "its inputs and outputs"
            )
        a = math.prod(self.shape)
        b = math.prod(shape) // a
        most = min(a, b)
        if is_share(self.terms):
            return a, b, largest(lambda t: t * (a + b), most, self.terms * a * b)
        if self.terms > max(most, 1):
            raise ValueError(f"{path}: Kronecker found terms={self.terms}, expected at most {most}, where it is exact")
        return a, b, int(self.terms)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> TensorNetwork:
        """The node for one array."""
        a, b, terms = self._sizes(context.path, w.shape)
        (p, q), window = self.shape, w.shape[:-2]
        inner = (w.shape[-2] // p, w.shape[-1] // q)
        n = len(window)
        blocks = w.reshape(*window, p, inner[0], q, inner[1]).transpose(n, n + 2, *range(n), n + 1, n + 3)
        left, right = truncated_svd(blocks.reshape(a, b), terms)
        names = _WINDOW[:n]
        factors = left.T.reshape(terms, p, q), right.reshape(terms, *window, *inner)
        return TensorNetwork(factors, f"tac,t{names}bd->{names}abcd", (*[1] * n, 2, 2))


@dataclasses.dataclass(frozen=True)
class Monarch(Method):
    """Two block-diagonal matrices with a permutation between them (Dao et al. 2022, arXiv:2204.00595).

    The inputs fall into ``blocks`` groups, the outputs of the first product into as many, and each pair of them is a
    matrix of rank one: the projection is closed, by as many decompositions. A butterfly of two stages; the numbers kept
    are ``blocks * (inputs + outputs)``. The window of a convolution goes with the inputs. A matrix that is sharded by
    inputs stays where it is if the blocks are as many as the devices, or a multiple; else it is gathered, once.

    Attributes:
      blocks: of either matrix; it divides inputs and outputs.

    Raises:
      ValueError: if it does not.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> node = jc.factorize.Monarch(blocks=4)(jax.random.normal(jax.random.key(0), (16, 8)))
      >>> [x.shape for x in node.factors], node.nbits() // 32
      ([(4, 4, 4), (4, 4, 2)], 96)
    """

    blocks: int

    def __post_init__(self) -> None:
        check_rank("Monarch", self.blocks)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the blocks do not divide the axes."""
        check_filled("Monarch", path, shape)
        if len(shape) < 2 or shape[-2] % self.blocks or shape[-1] % self.blocks:
            raise ValueError(
                f"{path}: Monarch found blocks={self.blocks} for an array of shape {shape}; use a number that divides "
                "its inputs and outputs"
            )

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> TensorNetwork:
        """The node for one array."""
        self.check(context.path, w.shape, w.dtype)
        k, window = self.blocks, w.shape[:-2]
        i, o, n = w.shape[-2] // k, w.shape[-1] // k, len(window)
        # Of each pair of blocks, of inputs and of outputs, a matrix (window and input, output).
        parts = w.reshape(*window, k, i, o, k).transpose(n, n + 3, *range(n), n + 1, n + 2)
        left, right = truncated_svd(parts.reshape(k, k, -1, o), 1)
        names = _WINDOW[:n]
        factors = left.reshape(k, k, *window, i), right.reshape(k, k, o)
        return TensorNetwork(factors, f"kj{names}i,kjl->{names}kilj", (*[1] * n, 2, 2))
