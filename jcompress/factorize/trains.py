"""Tensor trains and rings: a chain of cores, one for each mode."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Context, Method
from jcompress.factorize import mode_order
from jcompress.factorize.rank_choice import Choice, check_concrete
from jcompress.factorize.subspaces import across, check_filled, check_rank, is_share, largest, leading
from jcompress.formats.network import TensorNetwork, refitted
from jcompress.numeric import scaling

_MODES, _BONDS = "abcdefghijklm", "nopqrstuvwxyz"
_MOST = 10  # modes; all orders of them take some 500 unfoldings
BEST = "best"
_HIGH = jax.lax.Precision.HIGHEST

Shape = tuple[tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class TensorTrain(Method):
    """``w(i_1, ..., i_d) = G_1[i_1] G_2[i_2] ... G_d[i_d]``, a product of matrices (Oseledets 2011).

    By one truncated decomposition after the other: the squared error is at most the sum of those of the unfoldings, so
    at most ``sqrt(d - 1)`` times the best. With ``shape``, a dense layer becomes a TT-matrix: the inputs and the
    outputs are split into as many modes, and each core has one of either (Novikov et al. 2015, arXiv:1509.06569); the
    window of a convolution is a core of its own. Without, the modes are the axes of the array, taken in ``order``.

    Of a sharded array each core moves the Gram matrix of the smaller side, the modes until it or those after it, and
    thin products. Where the sharded mode is on that side, what the cores before have left of the array is gathered;
    ranks by values gather all of it.

    Attributes:
      rank: the largest rank, or the share of the numbers that is kept, in (0, 1); or ``"evbmf"``, for each bond that of
        most evidence in noise (:func:`jcompress.factorize.evbmf`).
      shape: the modes of the inputs and of the outputs, such as ``((4, 8, 8), (8, 8, 4))``; or None.
      order: the axes in the order of the train, such as ``(-2, 0, 1, -1)``, which makes a chain of 1x1, d x 1, 1 x d
        and 1x1 convolutions (Gabor & Zdunek 2022). By default as they are. With ``shape``, the modes (window, inputs,
        outputs), a core each. ``"best"`` takes that of all orders whose bound, from the singular values of all
        unfoldings, is least: the fewest numbers for a tolerance, an energy or evidence; the least error of the worst
        unfolding for a share of the numbers, each bond with a rank of its own; the least error for one rank.
      tolerance: instead of a rank, the relative error that must not be exceeded, in (0, 1).
      energy: instead of a rank, the part of the squared norm to keep, in (0, 1]. Ranks that depend on the values are
        found outside ``jit`` only. Of stacked layers, what the worst one needs.

    Raises:
      ValueError: for modes that do not multiply to the axes; not one of a rank, a tolerance and an energy.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> w = jax.random.normal(jax.random.key(0), (24, 8))
      >>> node = jc.factorize.TensorTrain(rank=4, shape=((4, 6), (2, 4)))(w)
      >>> [x.shape for x in node.factors], node.shape
      ([(4, 2, 4), (4, 6, 4)], (24, 8))
    """

    rank: int | float | Literal["evbmf"] | None = None
    shape: Shape | None = None
    order: tuple[int, ...] | Literal["best"] | None = None
    tolerance: float | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        Choice.of("TensorTrain", self.rank, self.energy, self.tolerance)
        if isinstance(self.order, str) and self.order != BEST:
            raise ValueError(f"TensorTrain: order={self.order!r} is unknown; use {BEST!r}, or each axis once")

    @property
    def whole(self) -> bool:  # type: ignore[override]  # of the instance here
        """Whether stacked layers come as one array: where ranks depend on the values, all get the same ones."""
        return self.order == BEST or Choice.of("TensorTrain", self.rank, self.energy, self.tolerance) is not None

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the modes do not fit the array."""
        _modes("TensorTrain", path, shape, self.shape, self.order)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> TensorNetwork:
        """The node for one array."""
        modes = _modes("TensorTrain", context.path, w.shape[context.batch :], self.shape, self.order)
        if not self.whole:
            return _train(w, modes, modes.ranks(self.rank))
        check_concrete("TensorTrain", context.path, w)
        modes, ranks = self._chosen(w.reshape(-1, *w.shape[context.batch :]), modes)
        train = partial(_train, modes=modes, ranks=ranks)
        for _ in range(context.batch):
            train = jax.vmap(train)
        return train(w)

    def _chosen(self, layers: jax.Array, modes: Modes) -> tuple[Modes, list[int]]:
        """The order of the modes and the ranks, the same for all layers."""
        choice, given = Choice.of("TensorTrain", self.rank, self.energy, self.tolerance), None
        if self.order == BEST:
            given = _best(layers, modes, choice or self.rank)
            modes = dataclasses.replace(modes, cores=tuple(modes.cores[i] for i in given.order))
        if choice is None:
            return modes, given.ranks if given and is_share(self.rank) else modes.ranks(self.rank)
        return modes, [max(column) for column in zip(*(_ranks_for(x, modes, choice) for x in layers), strict=True)]


@dataclasses.dataclass(frozen=True)
class TensorRing(Method):
    """``w(i_1, ..., i_d) = tr(G_1[i_1] ... G_d[i_d])``, a train closed to a ring (Zhao et al. 2016, arXiv:1606.05535).

    Started from a decomposition whose first rank is shared out to both ends, then sweeps of alternating least squares.
    The modes may be turned in a circle. A sharded array is gathered where :class:`TensorTrain` gathers it.

    Attributes:
      rank: of all bonds, or the share of the numbers that is kept, in (0, 1).
      shape: as in :class:`TensorTrain`.
      order: as in :class:`TensorTrain`.
      sweeps: of alternating least squares.

    Raises:
      ValueError: for modes that do not multiply to the axes.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> w = jax.random.normal(jax.random.key(0), (4, 6, 8))
      >>> [x.shape for x in jc.factorize.TensorRing(rank=2)(w).factors]
      [(2, 4, 2), (2, 6, 2), (2, 8, 2)]
    """

    rank: int | float
    shape: Shape | None = None
    order: tuple[int, ...] | None = None
    sweeps: int = 20

    def __post_init__(self) -> None:
        check_rank("TensorRing", self.rank)
        if isinstance(self.order, str):
            raise ValueError(
                f"TensorRing: found order={self.order!r}, expected each axis once; a ring has no best order"
            )
        if self.shape is not None and self.order is not None:
            raise ValueError("TensorRing: found a shape and an order of axes; give one of them")

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the modes do not fit the array."""
        _modes("TensorRing", path, shape, self.shape, self.order)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> TensorNetwork:
        """The node for one array."""
        modes = _modes("TensorRing", context.path, w.shape, self.shape, self.order)
        rank, sizes = self.rank, modes.sizes
        if is_share(rank):
            rank = largest(lambda r: r * r * sum(sizes), max(sizes), rank * math.prod(sizes))
        unit = scaling.unit([w])
        whole = unit.divide(w).reshape(modes.shape)
        factors = refitted(modes.equation(ring=True), _ring_start(whole, modes, int(rank)), whole, self.sweeps)
        return modes.node((unit.multiply(factors[0]), *factors[1:]), w.dtype, ring=True)


@dataclasses.dataclass(frozen=True)
class Modes:
    """How an array is cut into the modes of a chain of cores.

    Attributes:
      shape: of the array, its axes cut into the modes.
      cores: for each core, which of these axes it holds.
      merged: how many of them make each axis of the array.
    """

    shape: tuple[int, ...]
    cores: tuple[tuple[int, ...], ...]
    merged: tuple[int, ...]

    @property
    def sizes(self) -> list[int]:
        """The numbers of entries of each core's modes."""
        return [math.prod(self.shape[i] for i in held) for held in self.cores]

    def split(self, w: jax.Array) -> jax.Array:
        """The array with its modes in the order of the cores."""
        return w.reshape(self.shape).transpose([i for held in self.cores for i in held])

    def equation(self, ring: bool) -> str:
        """The contraction of the cores."""
        bonds = _BONDS[: len(self.cores) - 1]
        left = (_BONDS[len(bonds)] if ring else "", *bonds)
        right = (*bonds, _BONDS[len(bonds)] if ring else "")
        held = ["".join(_MODES[i] for i in axes) for axes in self.cores]
        terms = [a + modes + b for a, modes, b in zip(left, held, right, strict=True)]
        return f"{','.join(terms)}->{_MODES[: len(self.shape)]}"

    def node(self, factors: Sequence[jax.Array], dtype: Any, ring: bool) -> TensorNetwork:
        """The node of cores."""
        return TensorNetwork(tuple(x.astype(dtype) for x in factors), self.equation(ring), self.merged)

    def ranks(self, rank: Any) -> list[int]:
        """The rank of each bond, none larger than either side of it needs."""
        sizes, whole = self.sizes, math.prod(self.sizes)

        def bonds(r: int) -> list[int]:
            sides = [math.prod(sizes[:i]) for i in range(1, len(sizes))]
            return [min(r, n, whole // max(n, 1)) for n in sides]

        def numbers(r: int) -> int:
            edges = [1, *bonds(r), 1]
            return sum(a * n * b for a, n, b in zip(edges, sizes, edges[1:], strict=False))

        if is_share(rank):
            rank = largest(numbers, math.isqrt(whole) + 1, rank * whole)
        return bonds(int(rank))


def _modes(
    name: str, path: str, shape: tuple[int, ...], given: Shape | None, order: tuple[int, ...] | str | None
) -> Modes:
    ndim = len(shape)
    if ndim < 2:
        raise ValueError(f"{path}: {name} needs two axes or more, found shape {shape}; keep it dense")
    check_filled(name, path, shape)
    if given is None:
        return Modes(shape, _alone(name, path, shape, order), (1,) * ndim)
    inputs, outputs = given
    if (
        (order is None and len(inputs) != len(outputs))
        or math.prod(inputs) != shape[-2]
        or math.prod(outputs) != shape[-1]
    ):
        raise ValueError(
            f"{path}: {name} found modes {inputs} and {outputs}, with products {math.prod(inputs)} and "
            f"{math.prod(outputs)}, for {shape[-2]} inputs and {shape[-1]} outputs; give as many of either that "
            "multiply to them"
        )
    window, n = tuple(range(ndim - 2)), len(inputs)
    cut, merged = (*shape[:-2], *inputs, *outputs), (*[1] * len(window), n, len(outputs))
    if order is not None:
        return Modes(cut, _alone(name, path, cut, order), merged)
    pairs = tuple((ndim - 2 + i, ndim - 2 + n + i) for i in range(n))
    cores = (window, *pairs) if window else pairs
    return Modes(cut, cores, merged)


def _alone(
    name: str, path: str, shape: tuple[int, ...], order: tuple[int, ...] | str | None
) -> tuple[tuple[int, ...], ...]:
    """A core for each mode, in their order."""
    ndim = len(shape)
    if len(shape) > (_MOST if order == BEST else len(_MODES)):
        raise ValueError(f"{path}: {name} found {ndim} modes {shape}, too many for order={order}; merge or order them")
    places = range(ndim) if order is None or isinstance(order, str) else [a % ndim for a in order]
    if sorted(places) != list(range(ndim)):
        raise ValueError(f"{path}: {name} found order={order} for modes {shape}, expected each of them once")
    return tuple((i,) for i in places)


def _best(layers: jax.Array, modes: Modes, wanted: Any) -> mode_order.Ordered:
    """The best order of the modes at ranks that are chosen, a share of the numbers, or one rank."""
    whole = np.asarray(scaling.unit([layers]).divide(layers)).reshape(-1, *modes.shape)
    known = mode_order.unfoldings(list(whole))
    if isinstance(wanted, Choice):
        return mode_order.of_choice(modes.shape, known, wanted)
    if is_share(wanted):
        return mode_order.of_numbers(modes.shape, known, wanted * math.prod(modes.shape))
    return mode_order.of_rank(modes.shape, known, wanted)


def _train(w: jax.Array, modes: Modes, ranks: list[int]) -> TensorNetwork:
    """The cores, all but the last orthonormal; the first without its rank of 1 in front."""
    unit = scaling.unit([w])
    found, rest, rows = [], modes.split(unit.divide(w)), 0
    for held, rank in zip(modes.cores, ranks, strict=False):
        rows += len(held)
        sides = rest.shape[:rows]
        found.append(leading(rest, rank, rows).reshape(*sides, rank))
        # Of all directions no product is needed: then the core is the identity.
        is_all = rank >= math.prod(sides)
        rest = rest.reshape(rank, *rest.shape[rows:]) if is_all else across(found[-1], rest, range(rows))
        rows = 1
    return modes.node((*found, unit.multiply(rest)), w.dtype, ring=False)


def _ranks_for(w: jax.Array, modes: Modes, choice: Choice) -> list[int]:
    """Ranks of one layer; what may be left out is shared out evenly over the steps."""
    rest, before, found = modes.split(scaling.unit([w]).divide(w)), 1, []
    norm = float(jnp.sum(jnp.square(rest)))
    for n in modes.sizes[:-1]:
        rest = rest.reshape(before * n, -1)
        _, s, v = jnp.linalg.svd(rest, full_matrices=False)
        rank = choice.rank(np.asarray(s), (rest.shape[0], rest.shape[1]), steps=len(modes.cores) - 1, norm=norm)
        found.append(rank)
        rest, before = s[:rank, None] * v[:rank], rank
    return found


def _ring_start(w: jax.Array, modes: Modes, rank: int) -> list[jax.Array]:
    """Cores (rank, modes, rank): the first bond's directions are shared out to both ends, the rest is a train."""
    rest, rows = modes.split(w), len(modes.cores[0])
    most = min(rank * rank, modes.sizes[0])
    u = _padded(leading(rest, most, rows), rank * rank).reshape(*rest.shape[:rows], rank, rank)
    found = [jnp.moveaxis(u, -2, 0)]
    rest = jnp.moveaxis(across(u, rest, range(rows)), 0, -1)  # the end of the ring comes last
    for held in modes.cores[1:-1]:
        rows = 1 + len(held)
        sides = math.prod(rest.shape[:rows]), math.prod(rest.shape[rows:])
        u = _padded(leading(rest, min(rank, *sides), rows), rank).reshape(*rest.shape[:rows], rank)
        found.append(u)
        rest = across(u, rest, range(rows))
    return [*found, rest]


def _padded(u: jax.Array, columns: int) -> jax.Array:
    """With small columns beside those that there are, so that a sweep may use them."""
    more = jax.random.normal(jax.random.key(0), (len(u), columns - u.shape[1]), u.dtype) * 0.1
    return jnp.concatenate([u, more], axis=1) if u.shape[1] < columns else u
