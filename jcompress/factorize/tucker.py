"""Tucker: a small core, and a matrix for each mode; sums of several are block terms."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.factorize.rank_choice import Choice, check_concrete, singular_values
from jcompress.factorize.subspaces import check_filled, improved, is_share, leading, unfolded
from jcompress.formats.network import TensorNetwork, contract, refitted
from jcompress.numeric import scaling

_OUTER, _INNER = "abcdefghij", "qrstuvwxyz"


@dataclasses.dataclass(frozen=True)
class Tucker(Method):
    """A core times an orthonormal matrix along each of some modes: ``G x_1 U_1 x_2 U_2 ...``.

    Higher-order SVD, the leading left singular vectors of one unfolding after the other (Vannieuwenhoven et al. 2012),
    and rounds of orthogonal iteration on it (De Lathauwer et al. 2000). The error of the start is at most
    ``sqrt(modes)`` times the best, and no round makes it larger. Over the inputs and outputs of a convolution this is
    Tucker-2: a 1x1, a small and a 1x1 convolution (Kim et al. 2016, arXiv:1511.06530).

    Of a sharded array Gram matrices (mode, mode) and thin products cross devices. The start takes the Gram matrix of
    the first of ``axes``, or of all others where they are fewer numbers; sharded on that side, the array is gathered,
    once. Ranks that depend on the values gather it, too.

    Attributes:
      ranks: one for each of ``axes``, one number for all, or the share of the numbers that is kept, in (0, 1): then the
        ranks are in proportion to the modes. ``"evbmf"`` for that of most evidence in noise, of each unfolding
        (:func:`jcompress.factorize.evbmf`).
      axes: the modes with a matrix, negative: inputs and outputs. None for all.
      sweeps: rounds of orthogonal iteration.
      energy: instead of ranks, the part of the squared norm to keep, in (0, 1].
      tolerance: instead of ranks, the relative error that must not be exceeded, in (0, 1). Ranks that depend on the
        values are found outside ``jit`` only. Of stacked layers, what the worst one needs.

    Raises:
      ValueError: for ranks above the modes, or as many as there are no axes; not one of ranks, energy and tolerance.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> w = jax.random.normal(jax.random.key(0), (3, 3, 8, 6))
      >>> node = jc.factorize.Tucker(ranks=(4, 3))(w)
      >>> [x.shape for x in node.factors]
      [(3, 3, 4, 3), (8, 4), (6, 3)]
    """

    ranks: tuple[int, ...] | int | float | Literal["evbmf"] | None = None
    axes: tuple[int, ...] | None = (-2, -1)
    sweeps: int = 3
    energy: float | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        Choice.of("Tucker", self.ranks, self.energy, self.tolerance)
        if isinstance(self.ranks, tuple) and (
            any(map(is_share, self.ranks)) or len(self.ranks) != len(self.axes or self.ranks)
        ):
            raise ValueError(f"Tucker: found ranks={self.ranks} for axes={self.axes}, expected a whole number for each")

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the ranks do not fit the modes."""
        chosen_ranks("Tucker", path, 1 if self.whole else self.ranks, self.axes, shape)

    @property
    def whole(self) -> bool:  # type: ignore[override]  # of the instance here
        """Whether stacked layers come as one array: where ranks depend on the values, all get the same ones."""
        return Choice.of("Tucker", self.ranks, self.energy, self.tolerance) is not None

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> TensorNetwork:
        """The node for one array."""
        if not self.whole:
            return self._fitted(w, context)
        check_concrete("Tucker", context.path, w)
        self.check(context.path, w.shape[context.batch :], w.dtype)
        layers = w.reshape(-1, *w.shape[context.batch :])
        ranks = tuple(max(column) for column in zip(*map(self._ranks_for, layers), strict=True))
        fit: Any = Tucker(ranks, self.axes, self.sweeps)._fitted
        for _ in range(context.batch):
            fit = jax.vmap(fit)
        return fit(w)

    def _ranks_for(self, w: jax.Array) -> list[int]:
        """Of one layer, by the singular values of its unfoldings: their tails add up to no less than the error."""
        choice = Choice.of("Tucker", self.ranks, self.energy, self.tolerance)
        axes = range(w.ndim) if self.axes is None else [a % w.ndim for a in self.axes]
        matrices = [unfolded(w, [axis]) for axis in axes]
        assert choice is not None
        return [choice.rank(singular_values(m), m.shape, steps=len(matrices)) for m in matrices]

    @core.compiled
    def _fitted(self, w: jax.Array, context: Context = Context(), /) -> TensorNetwork:
        axes, ranks = chosen_ranks("Tucker", context.path, self.ranks, self.axes, w.shape)
        unit = scaling.unit([w])
        small, matrices = decompose(unit.divide(w), axes, ranks, self.sweeps)
        inner = {axis: _INNER[i] for i, axis in enumerate(axes)}
        modes = _OUTER[: w.ndim]
        terms = ["".join(inner.get(i, m) for i, m in enumerate(modes)), *(modes[i] + inner[i] for i in axes)]
        factors = (unit.multiply(small), *matrices)
        return TensorNetwork(tuple(x.astype(w.dtype) for x in factors), f"{','.join(terms)}->{modes}", (1,) * w.ndim)


def chosen_ranks(
    name: str, path: str, ranks: Any, axes: tuple[int, ...] | None, shape: tuple[int, ...], terms: int = 1
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The modes that get a matrix, rising, and the rank of each.

    Raises:
      ValueError: for axes that are not there, or ranks above the modes; the message names the path.
    """
    ndim = len(shape)
    chosen = tuple(range(ndim)) if axes is None else tuple(a % ndim if -ndim <= a < ndim else -1 for a in axes)
    if ndim < 2 or -1 in chosen or len(set(chosen)) != len(chosen):
        raise ValueError(
            f"{path}: {name} over axes {axes} found shape {shape}; choose axes that it has, or keep it dense"
        )
    check_filled(name, path, shape)
    sizes = [shape[i] for i in chosen]
    if is_share(ranks):
        found = _shared_ranks(ranks, sizes, shape, chosen, terms)
    else:
        found = tuple(min(ranks, n) for n in sizes) if isinstance(ranks, int) else tuple(ranks)
        if len(found) != len(sizes) or any(r > n for r, n in zip(found, sizes, strict=False)):
            raise ValueError(f"{path}: {name} found ranks {found} for modes of lengths {sizes}; use at most these")
    return chosen, found


def _shared_ranks(
    share: float, sizes: list[int], shape: tuple[int, ...], axes: tuple[int, ...], terms: int
) -> tuple[int, ...]:
    """Ranks in proportion to the modes, as large as the share of the numbers allows."""
    whole, beside = 1, 1
    for i, n in enumerate(shape):
        whole, beside = whole * n, beside * (1 if i in axes else n)

    def ranks(part: float) -> tuple[int, ...]:
        return tuple(min(n, max(1, math.floor(part * n + 1e-9))) for n in sizes)

    def numbers(found: tuple[int, ...]) -> int:
        core_size = beside
        for r in found:
            core_size *= r
        return terms * (core_size + sum(n * r for n, r in zip(sizes, found, strict=True)))

    parts = sorted({k / n for n in sizes for k in range(1, n + 1)} | {1e-9})
    allowed = [p for p in parts if numbers(ranks(p)) <= share * whole]
    found = ranks(allowed[-1] if allowed else parts[0])
    # One more where that still fits: proportions move all modes at once.
    for i in sorted(range(len(sizes)), key=lambda i: found[i] / sizes[i]):
        more = (*found[:i], found[i] + 1, *found[i + 1 :])
        if more[i] <= sizes[i] and numbers(more) <= share * whole:
            found = more
    return found


def decompose(
    w: jax.Array, axes: tuple[int, ...], ranks: tuple[int, ...], sweeps: int
) -> tuple[jax.Array, list[jax.Array]]:
    """The core of a float32 array, and an orthonormal matrix (mode, rank) for each axis."""
    found: list[jax.Array] = []
    rest = w
    for axis, rank in zip(axes, ranks, strict=True):
        found.append(leading(jnp.moveaxis(rest, axis, 0), rank))
        rest = _projected(rest, [(axis, found[-1])])
    for _ in range(sweeps if len(axes) > 1 else 0):
        for i, axis in enumerate(axes):
            others = [(a, u) for j, (a, u) in enumerate(zip(axes, found, strict=True)) if j != i]
            partly = _projected(w, others)
            found[i] = improved(jnp.moveaxis(partly, axis, 0), found[i])
            rest = _projected(partly, [(axis, found[i])])
    return rest, found


def _projected(w: jax.Array, matrices: list[tuple[int, jax.Array]]) -> jax.Array:
    for axis, u in matrices:
        product = jnp.tensordot(w, u, axes=(axis, 0), precision=jax.lax.Precision.HIGHEST)
        w = jnp.moveaxis(product, -1, axis)
    return w


@dataclasses.dataclass(frozen=True)
class BlockTerm(Method):
    """A sum of Tucker decompositions of one size (De Lathauwer 2008; for layers Ye et al. 2018, arXiv:1712.05134).

    Each term starts from what those before it leave, and then all are refitted together. One term is Tucker; with cores
    of one number it is CP. A sharded array is gathered where :class:`Tucker` gathers it, once a term.

    Attributes:
      terms: how many.
      ranks: of each term, as in :class:`Tucker`; a share counts all terms.
      axes: as in :class:`Tucker`.
      sweeps: of alternating least squares over all factors.

    Raises:
      ValueError: for ranks above the modes, or fewer than one term.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> w = jax.random.normal(jax.random.key(0), (3, 3, 8, 6))
      >>> [x.shape for x in jc.factorize.BlockTerm(terms=2, ranks=(2, 2))(w).factors]
      [(2, 3, 3, 2, 2), (2, 8, 2), (2, 6, 2)]
    """

    terms: int = 2
    ranks: tuple[int, ...] | int | float = 0.1
    axes: tuple[int, ...] | None = (-2, -1)
    sweeps: int = 10

    def __post_init__(self) -> None:
        if Tucker(self.ranks, self.axes).whole:
            raise ValueError(f"BlockTerm: ranks={self.ranks!r} depends on the values; give numbers or a share")
        if self.terms < 1:
            raise ValueError(f"BlockTerm: terms={self.terms} must be at least 1")

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the ranks do not fit the modes."""
        chosen_ranks("BlockTerm", path, self.ranks, self.axes, shape, self.terms)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> TensorNetwork:
        """The node for one array."""
        axes, ranks = chosen_ranks("BlockTerm", context.path, self.ranks, self.axes, w.shape, self.terms)
        unit = scaling.unit([w])
        whole = unit.divide(w)
        inner, modes = {axis: _INNER[i] for i, axis in enumerate(axes)}, _OUTER[: w.ndim]
        names = [
            "p" + "".join(inner.get(i, m) for i, m in enumerate(modes)),
            *("p" + modes[i] + inner[i] for i in axes),
        ]
        equation = f"{','.join(names)}->{modes}"
        blocks, rest = [], whole
        for _ in range(self.terms):
            small, matrices = decompose(rest, axes, ranks, 1)
            blocks.append((small, *matrices))
            rest = rest - contract(equation, *(x[None] for x in blocks[-1]))
        factors = [jnp.stack(column) for column in zip(*blocks, strict=True)]
        first, *others = refitted(equation, factors, whole, self.sweeps)
        found = (unit.multiply(first), *others)
        return TensorNetwork(tuple(x.astype(w.dtype) for x in found), equation, (1,) * w.ndim)
