"""Low rank by singular value decomposition."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.factorize.rank_choice import Choice, check_concrete, singular_values
from jcompress.factorize.subspaces import check_filled, is_share, largest
from jcompress.formats import LowRank
from jcompress.formats.lowrank import truncated_svd
from jcompress.numeric import scaling


@dataclasses.dataclass(frozen=True)
class SVD(Method):
    """The best approximation of a given rank in the Frobenius norm (Eckart & Young 1936).

    ``W ~ U_r S_r V_r^T``, the singular values shared evenly by both factors. A convolution kernel counts as the
    (window and input) x output matrix. Bytes are won for ``rank < m * n / (m + n)``. Gathers a sharded matrix.

    Attributes:
      rank: the rank, at most the smaller side, or the share of the numbers that is kept, in (0, 1); or ``"evbmf"``,
        that of most evidence in noise (:func:`jcompress.factorize.evbmf`).
      energy: instead of a rank, the part of the squared singular values to keep, in (0, 1].
      tolerance: instead of a rank, the relative error that must not be exceeded, in (0, 1). Ranks that depend on the
        values are found outside ``jit`` only. Of stacked layers, what the worst one needs.
      randomized: approximate by a sketch with power iterations (Halko et al. 2011, arXiv:0909.4061), which needs a
        key. Matrix products and thin QR only: large matrices compile and run faster on accelerators.

    Of a sharded matrix the exact decomposition gathers all of it on every device, once an axis: XLA has none that works
    on parts. The sketch moves thin matrices alone, of ``max(m, n)`` times ``rank + max(8, rank // 2)`` numbers at most,
    one to be added up and one to be gathered for each of its eight products.

    Raises:
      ValueError: for a rank above the limit, an energy or a tolerance outside (0, 1), or not one of the three given.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.outer(jnp.arange(1.0, 5.0), jnp.arange(1.0, 4.0))
      >>> node = jc.factorize.SVD(rank=1)(w)
      >>> node.u.shape, node.v.shape, bool(jnp.allclose(node.materialize(), w, atol=1e-4))
      ((4, 1), (1, 3), True)
    """

    rank: int | float | Literal["evbmf"] | None = None
    energy: float | None = None
    randomized: bool = False
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self._choice is not None and self.randomized:
            raise ValueError("SVD: randomized=True needs a rank; what depends on the values needs all singular values")

    @property
    def _choice(self) -> Choice | None:
        return Choice.of("SVD", self.rank, self.energy, self.tolerance)

    takes_complex: ClassVar[bool] = True

    @property
    def whole(self) -> bool:  # type: ignore[override]  # of the instance here
        """Whether stacked layers come as one array: where the rank depends on the values, all get the same one."""
        return self._choice is not None

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be in the context."""
        return ("key",) if self.randomized else ()

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the array is no matrix or the rank exceeds its smaller side."""
        if len(shape) < 2:
            raise ValueError(f"{path}: SVD needs a matrix, found shape {shape}; keep it dense")
        rank: Any = 1 if self._choice else self.rank
        chosen_rank("SVD", path, rank, shape)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> LowRank:
        """The node for one array."""
        w, layers = core.widened(w), w.shape[: context.batch]
        self.check(context.path, w.shape[context.batch :], w.dtype)
        matrix = w.reshape(*layers, *_matrix_shape(w.shape[context.batch :]))
        rank: Any = self.rank
        if (choice := self._choice) is not None:
            check_concrete("SVD", context.path, w)
            values = singular_values(matrix).reshape(-1, min(matrix.shape[-2:]))
            rank = max(choice.rank(x, matrix.shape[-2:]) for x in values)
        rank = chosen_rank("SVD", context.path, rank, w.shape[context.batch :])
        u, v = _sketched(matrix, rank, context.key) if self.randomized else truncated_svd(matrix, rank)
        return LowRank(u.reshape(*w.shape[:-1], rank), v)


def chosen_rank(name: str, path: str, rank: int | float, shape: tuple[int, ...]) -> int:
    """The rank for an array of some shape.

    Raises:
      ValueError: for an array that is no matrix, or a rank above the limit; the message names the path.
    """
    if len(shape) < 2:
        raise ValueError(f"{path}: {name} needs a matrix, found shape {shape}; keep it dense")
    if is_share(rank):
        check_filled(name, path, shape)
    rows, columns = _matrix_shape(shape)
    most, broken_even = min(rows, columns), rows * columns / max(rows + columns, 1)
    if is_share(rank):
        return largest(lambda r: r * (rows + columns), max(most, 1), rank * rows * columns)
    if rank > most:
        raise ValueError(
            f"{path}: rank {rank} is above the limit {most} of a {rows} x {columns} matrix; use at most that, and less "
            f"than {broken_even:.4g} to win bytes"
        )
    return int(rank)


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    rows = 1
    for n in shape[:-1]:
        rows *= n
    return rows, shape[-1]


def _adjoint(x: jax.Array) -> jax.Array:
    return x.T.conj()


def _sketched(matrix: jax.Array, rank: int, key: jax.Array, iterations: int = 3) -> tuple[jax.Array, jax.Array]:
    """Range finder with power iterations, then an exact decomposition of the small projection."""
    unit = scaling.unit([matrix])
    a = unit.divide(matrix)
    # More columns converge in fewer rounds, and a product of a few more costs little.
    width = min(rank + max(8, rank // 2), *a.shape)
    high = jax.lax.Precision.HIGHEST
    basis = jnp.matmul(a, jax.random.normal(key, (a.shape[1], width), a.dtype), precision=high)
    for i in range(iterations + 1):
        basis = jnp.linalg.qr(basis)[0]
        # A thin matrix from the left: on a CPU three times as fast as the transposed product.
        back = jnp.matmul(_adjoint(basis), a, precision=high)
        if i < iterations:
            # One decomposition a round, but the last: two products square what rounding makes of small values.
            back = _adjoint(back) if i < iterations - 1 else jnp.linalg.qr(_adjoint(back))[0]
            basis = jnp.matmul(a, back, precision=high)
    u, v = truncated_svd(back, rank)
    u, v = jnp.matmul(basis, u, precision=high) * unit.root, v * unit.root
    return u.astype(matrix.dtype), v.astype(matrix.dtype)
