"""CP: a sum of products of vectors, one for each mode."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.factorize.subspaces import across, check_filled, check_rank, is_share, largest, sketched
from jcompress.formats.network import TensorNetwork
from jcompress.numeric import scaling
from jcompress.numeric.damping import cholesky

_MODES = "abcdefghij"
_HIGH = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class CP(Method):
    """A sum of ``rank`` outer products, by alternating least squares (Carroll & Chang 1970; Harshman 1970).

    Of a convolution kernel the window is one mode by default, so it becomes a 1x1, a depthwise and a 1x1 convolution;
    apart, as in Lebedev et al. 2015, arXiv:1412.6553, a 1x1, two one-dimensional depthwise and a 1x1 convolution. A
    best tensor of a given rank need not exist: terms may grow against one another without end. So the columns of all
    factors share the size of each term, and a small ridge holds it. A sweep is two products with the array, whatever
    the number of modes (Phan et al. 2013).

    Of a sharded array thin products cross devices, in each sweep those of all factors. Sharded along another mode than
    the first whose unfolding is too narrow for a sketch, it is gathered once, for the start of that mode.

    Attributes:
      rank: the number of terms, or the share of the numbers that is kept, in (0, 1).
      window: whether the spatial axes of a convolution are one mode, ``"merged"``, or ``"apart"``.
      sweeps: at most so many.
      tolerance: it stops when a sweep takes off less than this part of the squared norm.
      ridge: as a fraction of the mean diagonal of the normal equations.

    Raises:
      ValueError: for a rank that is neither a whole number nor a share, or an array of fewer than two axes.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.einsum("a,b,c->abc", jnp.ones(3), jnp.arange(4.0), jnp.arange(5.0))
      >>> node = jc.factorize.CP(rank=1)(w)
      >>> [x.shape for x in node.factors], bool(jnp.allclose(node.materialize(), w, atol=1e-4))
      ([(3, 1), (4, 1), (5, 1)], True)
    """

    rank: int | float
    window: Literal["merged", "apart"] = "merged"
    sweeps: int = 200
    tolerance: float = 1e-7
    ridge: float = 1e-7

    def __post_init__(self) -> None:
        check_rank("CP", self.rank)
        if self.window not in ("merged", "apart"):
            raise ValueError(f"CP: window={self.window!r} is unknown; use 'merged' or 'apart'")

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the array has no two modes."""
        if len(shape) < 2:
            raise ValueError(f"{path}: CP needs two axes or more, found shape {shape}; keep it dense")
        check_filled("CP", path, shape)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> TensorNetwork:
        """The node for one array."""
        self.check(context.path, w.shape, w.dtype)
        groups = self._groups(w.ndim)
        sizes = [math.prod(w.shape[i] for i in group) for group in groups]
        rank = self._rank(sizes)
        unit = scaling.unit([w])
        whole = unit.divide(w).reshape(sizes)
        factors = _fitted(whole, _start(whole, rank), self.sweeps, self.tolerance, self.ridge)
        factors[-1] = unit.multiply(factors[-1])
        terms = ["".join(_MODES[i] for i in group) for group in groups]
        return TensorNetwork(
            tuple(
                x.reshape(*(w.shape[i] for i in group), rank).astype(w.dtype)
                for x, group in zip(factors, groups, strict=True)
            ),
            f"{','.join(term + 'z' for term in terms)}->{_MODES[: w.ndim]}",
            (1,) * w.ndim,
        )

    def _groups(self, ndim: int) -> list[list[int]]:
        window = [list(range(ndim - 2))] if self.window == "merged" and ndim > 2 else [[i] for i in range(ndim - 2)]
        return [*window, [ndim - 2], [ndim - 1]]

    def _rank(self, sizes: list[int]) -> int:
        if not is_share(self.rank):
            return int(self.rank)
        whole = math.prod(sizes)
        return largest(lambda r: r * sum(sizes), whole, self.rank * whole)


def _start(w: jax.Array, rank: int) -> list[jax.Array]:
    """The leading singular vectors of each unfolding, and columns that are always the same where there are no more.

    Of the first factor nothing but the lengths of its columns is read before it is refitted.
    """
    found = [jnp.zeros((w.shape[0], rank), jnp.float32).at[0].set(1)]
    for i, n in list(enumerate(w.shape))[1:]:
        u = sketched(jnp.moveaxis(w, i, 0), min(rank, n))
        more = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (n, rank - min(rank, n)), jnp.float32)
        found.append(jnp.concatenate([u, more / math.sqrt(n)], axis=1))
    return found


def _fitted(w: jax.Array, factors: list[jax.Array], sweeps: int, tolerance: float, ridge: float) -> list[jax.Array]:
    """Factors that no sweep changes much, each term's size shared by all of its vectors."""
    norm = jnp.maximum(jnp.sum(jnp.square(w)), jnp.finfo(jnp.float32).tiny)
    last = w.ndim - 1

    def refitted(factors: list[jax.Array], place: int, right: jax.Array) -> tuple[jax.Array, jax.Array]:
        gram = jnp.ones((), jnp.float32)
        for j in range(w.ndim):
            if j != place:
                gram = gram * jnp.matmul(factors[j].T, factors[j], precision=_HIGH)
        held = gram + ridge * jnp.mean(jnp.diagonal(gram)) * jnp.eye(len(gram), dtype=jnp.float32)
        return jax.scipy.linalg.cho_solve((cholesky(held)[0], True), right).T, gram

    def sweep(state: tuple) -> tuple:
        i, factors, error, _ = state
        factors = list(factors)
        # One product with the array serves all modes but the last, and a second one that.
        part = jnp.tensordot(w, factors[-1], 1, precision=_HIGH)
        for place in range(last):
            right = _summed(part, factors, place)
            factors[place], gram = refitted(factors, place, right)
        right = across(_columns(factors[:-1]), w, range(last))
        factors[last], gram = refitted(factors, last, right)
        found = factors[last]
        fit = 2 * jnp.sum(found.T * right) - jnp.sum(found * jnp.matmul(found, gram, precision=_HIGH))
        return i + 1, tuple(_balanced(factors)), 1 - fit / norm, error

    def going(state: tuple) -> jax.Array:
        i, _, error, before = state
        return (i < sweeps) & (jnp.abs(before - error) > tolerance)

    start = (jnp.int32(0), tuple(_balanced(factors)), jnp.float32(1), jnp.float32(jnp.inf))
    return list(jax.lax.while_loop(going, sweep, start)[1])


def _summed(part: jax.Array, factors: list[jax.Array], place: int) -> jax.Array:
    """An array (modes..., terms) times the columns of all factors but one, summed over their modes: (terms, mode)."""
    axes = [j for j in range(part.ndim - 1) if j != place]
    for j in axes:
        part = part * jnp.expand_dims(factors[j], [d for d in range(part.ndim - 1) if d != j])
    return part.sum(axes).T


def _columns(factors: list[jax.Array]) -> jax.Array:
    """The column-wise Kronecker product, (modes..., terms)."""
    found = factors[0]
    for x in factors[1:]:
        found = found[..., None, :] * x
    return found


def _balanced(factors: list[jax.Array]) -> list[jax.Array]:
    """The same terms, the vectors of each of one length."""
    sizes = [jnp.linalg.norm(x, axis=0) for x in factors]
    whole = sum(jnp.log(jnp.maximum(n, 1e-30)) for n in sizes)
    shared = jnp.exp(whole / len(factors))
    return [x * (shared / jnp.maximum(n, 1e-30)) for x, n in zip(factors, sizes, strict=True)]
