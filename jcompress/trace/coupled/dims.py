"""Dimensions as terms: a leaf, a concatenation, a product or another order of others, unified like types.

Two dimensions that an operation ties become one. A reshape factors, a slice or a concatenation splits, and what
cannot be told apart any more is pinned with a reason: its size stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jcompress.trace.coupled import orders
from jcompress.trace.coupled.orders import Order


class ClashError(Exception):
    """Two terms that cannot be one; the message says why."""


def is_shorter(a: Any, b: Any) -> bool:
    """Whether one length is less than another; of symbols, whether it divides the other.

    Raises:
      ClashError: if symbols do not tell.
    """
    try:
        return bool(a < b)
    except jax.errors.InconclusiveDimensionOperation:
        if b % a == 0:
            return True
        if a % b == 0:
            return False
        raise ClashError(f"lengths {a} and {b} cannot be compared") from None


class Dim:
    """A dimension: a leaf of some size, or a term over other dimensions.

    Attributes:
      size: its length in the traced program.
      kind: ``"leaf"``, ``"concat"``, ``"product"``, ``"order"`` of one leaf, or ``"link"`` to what it was unified with.
      parts: what it is made of, the outermost factor first.
      pinned: for a leaf, why its size must not change, or None.
      order: where each position of an order is taken from.
    """

    __slots__ = ("kind", "order", "parts", "pinned", "size")

    def __init__(self, size: int, kind: str = "leaf", parts: Sequence[Dim] = (), pinned: str | None = None) -> None:
        self.size, self.kind, self.parts, self.pinned = size, kind, tuple(parts), pinned
        self.order: Order | None = None

    def __repr__(self) -> str:
        d = find(self)
        if d.kind == "leaf":
            return f"{d.size}{'!' if d.pinned else ''}"
        return f"({(' + ' if d.kind == 'concat' else ' * ').join(map(repr, d.parts))})"


Dims = tuple[Dim, ...]


def whole(n: Any) -> Any:
    """A length as an int; one that is only a symbol stays what it is."""
    return int(n) if isinstance(n, (int, np.integer)) else n


def fresh(shape: Sequence[int], pinned: str | None = None) -> Dims:
    """A leaf for each length."""
    return tuple(Dim(whole(n), pinned=pinned) for n in shape)


def find(d: Dim) -> Dim:
    """What a dimension stands for now."""
    while d.kind == "link":
        (target,) = d.parts
        if target.kind == "link":
            d.parts = target.parts  # shortens the next search
        d = target
    return _pushed(d) if d.kind == "order" and find(d.parts[0]).kind != "leaf" else d


def _pushed(d: Dim) -> Dim:
    """An order of what is no leaf any more, as a term over orders of its parts."""
    inner, reason = find(d.parts[0]), None
    try:
        found = reordered(inner, d.order)
    except ClashError as clash:
        pin([inner], reason := str(clash))
        found = Dim(d.size, pinned=reason)
    d.kind, d.parts = "link", (found,)
    return find(found)


def reordered(d: Dim, order: Any) -> Dim:
    """The positions of a dimension in another order."""
    d = find(d)
    if (order == np.arange(d.size)).all():
        return d
    if d.kind == "order":
        return reordered(d.parts[0], np.asarray(d.order)[order])
    if d.kind == "leaf":
        found = Dim(d.size, "order", (d,))
        found.order = order
        return found
    parts = flat(d, d.kind)
    sizes = [p.size for p in parts]
    if d.kind == "product" and (each := orders.factors(order, sizes)) is not None:
        return product([reordered(p, o) for p, o in zip(parts, each, strict=True)])
    if d.kind == "product" and (k := orders.turned(order, sizes)) is not None:
        return product([*parts[k:], *parts[:k]])
    if d.kind == "concat" and (blocks := _blocks(order, parts)) is not None:
        return concat([reordered(p, o) for p, o in blocks])
    raise ClashError(f"its parts {d} are put in an order that mixes them")


def _blocks(order: Order, parts: Sequence[Dim]) -> list[tuple[Dim, Order]] | None:
    """The parts of a concatenation one after another in the new order, each with its own, or None."""
    starts = np.cumsum([0, *(p.size for p in parts)])
    found, at = [], 0
    while at < len(order):
        i = int(np.searchsorted(starts, order[at], "right")) - 1
        own = order[at : at + parts[i].size] - starts[i]
        if not orders.is_permutation(own, parts[i].size):
            return None
        found.append((parts[i], own))
        at += parts[i].size
    return found


def _join(kind: str, parts: Sequence[Dim]) -> Dim:
    """The concatenation or product of ``parts``, with the neutral ones left out."""
    neutral, size = (0, sum(p.size for p in parts)) if kind == "concat" else (1, math.prod(p.size for p in parts))
    told = [p for p in parts if p.size != neutral]
    return told[0] if len(told) == 1 else Dim(size, kind, told) if told else Dim(size)


def concat(parts: Sequence[Dim]) -> Dim:
    """One after the other."""
    return _join("concat", parts)


def product(parts: Sequence[Dim]) -> Dim:
    """All combinations, the last part changing fastest."""
    return _join("product", parts)


def flat(d: Dim, kind: str) -> list[Dim]:
    """The parts of a term of this kind, with those of its parts of the same kind in place."""
    d = find(d)
    if d.kind != kind:
        return [d]
    return [q for p in d.parts for q in flat(p, kind) if kind == "concat" or q.size != 1]


def leaves(d: Dim) -> Iterator[Dim]:
    """The leaves of a term in order; one that occurs twice comes twice."""
    d = find(d)
    if d.kind == "leaf":
        yield d
    else:
        for p in d.parts:
            yield from leaves(p)


def alias(dims: Sequence[Dim]) -> Dims:
    """The same dimensions under new names, for the results of what is not only a view of its operand."""
    return tuple(Dim(d.size, "link", (d,)) for d in dims)


def own_parts(d: Dim) -> set[Dim]:
    """The term as it was written: itself and its parts, without what it was unified with."""
    return {d}.union(*map(own_parts, d.parts)) if d.kind in ("concat", "product") else {d}


def pin(dims: Sequence[Dim], reason: str) -> None:
    """Forbid a change of size; the first reason stays."""
    for d in dims:
        for leaf in leaves(d):
            leaf.pinned = leaf.pinned or reason


def _turn(leaf: Dim, kind: str, sizes: Sequence[int]) -> list[Dim]:
    """Make a leaf a term over new leaves."""
    parts = list(fresh(sizes, leaf.pinned))
    leaf.kind, leaf.parts, leaf.pinned = kind, tuple(parts), None
    return parts


def as_concat(d: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Consecutive pieces of a dimension, of these sizes."""
    d, sizes = find(d), [whole(n) for n in sizes]
    if 0 in sizes:
        left = as_concat(d, [n for n in sizes if n]) if d.size else []
        return [left.pop(0) if n else Dim(0) for n in sizes]
    if len(sizes) == 1:
        return [d]
    if d.kind == "leaf":
        return _turn(d, "concat", sizes)
    if d.kind == "order":
        return _ordered_pieces(d, sizes)
    if d.kind == "product":
        factors = flat(d, "product")
        inner = math.prod(f.size for f in factors[1:])
        if any(n % inner for n in sizes):
            raise ClashError(f"a slice at {sizes} cuts through the factors {d}")
        outer = as_concat(factors[0], [n // inner for n in sizes])
        return [product([o, *factors[1:]]) for o in outer]
    return _regroup(flat(d, "concat"), sizes)


def _ordered_pieces(d: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Pieces of an order of a leaf, where each is taken from one run of the leaf."""
    found = orders.pieces(np.asarray(d.order), sizes)
    if found is None:
        raise ClashError(f"a slice at {list(sizes)} of a dimension in another order")
    first = np.argsort([start for start, _ in found])
    runs = as_concat(d.parts[0], [sizes[i] for i in first])
    placed = dict(zip(first.tolist(), runs, strict=True))
    return [reordered(placed[i], order) for i, (_, order) in enumerate(found)]


def _regroup(parts: list[Dim], sizes: Sequence[int]) -> list[Dim]:
    """Pieces of the wanted sizes from consecutive parts, splitting those that lie across an edge."""
    pieces, left = [], list(parts)
    for n in sizes:
        taken: list[Dim] = []
        while n:
            part = left.pop(0)
            if part.size > n:
                part, rest = as_concat(part, [n, part.size - n])
                left.insert(0, rest)
            taken.append(part)
            n -= part.size
        pieces.append(concat(taken) if taken else Dim(0))
    return pieces


def as_product(d: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Factors of a dimension, of these sizes, the outermost first."""
    d, sizes = find(d), [whole(n) for n in sizes]
    wanted = [n for n in sizes if n != 1]
    if len(wanted) <= 1:
        found = [d] if wanted else []
    elif d.kind == "leaf":
        found = _turn(d, "product", wanted)
    elif d.kind == "product":
        found = _refactor(flat(d, "product"), wanted)
    elif d.kind == "order":
        found = _ordered_factors(d, wanted)
    else:
        found = _factor_concat(flat(d, "concat"), wanted)
    return [found.pop(0) if n != 1 else Dim(1) for n in sizes]


def _ordered_factors(d: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Factors of an order of a leaf, ordered one by one, or turned about as where channels are shuffled."""
    order = np.asarray(d.order)
    if (each := orders.factors(order, sizes)) is not None:
        return [reordered(p, o) for p, o in zip(as_product(d.parts[0], sizes), each, strict=True)]
    for k in range(1, len(sizes)):
        before = [*sizes[k:], *sizes[:k]]
        if orders.turned(order, before) == len(sizes) - k:
            parts = as_product(d.parts[0], before)
            return [*parts[len(sizes) - k :], *parts[: len(sizes) - k]]
    raise ClashError(f"a reshape to {list(sizes)} of a dimension in another order")


def _refactor(factors: list[Dim], sizes: Sequence[int]) -> list[Dim]:
    """Factors of the wanted sizes from others, splitting those that are too large."""
    left, found = list(factors), []
    for n in sizes:
        taken: list[Dim] = []
        while n != 1:
            factor = left.pop(0)
            if n % factor.size:
                if factor.size % n:
                    raise ClashError(f"a reshape to {list(sizes)} mixes the factors {factors}")
                factor, rest = as_product(factor, [n, factor.size // n])
                left.insert(0, rest)
            taken.append(factor)
            n //= factor.size
        found.append(product(taken))
    return found


def _factor_concat(parts: list[Dim], sizes: Sequence[int]) -> list[Dim]:
    """A concatenation as a product: every part must have the same inner factors."""
    inner = math.prod(sizes[1:])
    if any(p.size % inner for p in parts):
        raise ClashError(f"a reshape to {list(sizes)} mixes the concatenated {parts}")
    rows = [as_product(p, [p.size // inner, *sizes[1:]]) for p in parts]
    for row in rows[1:]:
        for a, b in zip(rows[0][1:], row[1:], strict=True):
            unify(a, b)
    return [concat([row[0] for row in rows]), *rows[0][1:]]


def unify(a: Dim, b: Dim) -> None:
    """Make two dimensions one. If they cannot be, both are pinned."""
    try:
        _unify(a, b)
    except ClashError as clash:
        pin([a, b], str(clash))


def _unify(a: Dim, b: Dim) -> None:
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise ClashError(f"lengths {a.size} and {b.size} meet")
    if b.kind == "leaf":
        a, b = b, a
    if a.kind == "leaf":
        if any(leaf is a for leaf in leaves(b)):
            raise ClashError(f"a dimension meets a part of itself: {b}")
        a.kind, a.parts = "link", (b,)
        if a.pinned:
            pin([b], a.pinned)
        return
    if "order" in (a.kind, b.kind):
        a, b = (a, b) if a.kind == "order" else (b, a)
        _unify(a.parts[0], reordered(b, np.argsort(np.asarray(a.order))))
        return
    if a.kind != b.kind and a.kind == "concat":
        a, b = b, a
    # Of a product and a concatenation, the product is cut where the concatenation is.
    parts = flat(b, b.kind)
    split = as_concat if b.kind == "concat" else as_product
    for x, y in zip(split(a, [p.size for p in parts]), parts, strict=True):
        _unify(x, y)


def unify_all(first: Dims, *others: Dims) -> None:
    """Unify dimensions pairwise."""
    for other in others:
        for a, b in zip(first, other, strict=True):
            unify(a, b)


Sizes = Mapping[Dim, int]
"""New sizes of leaves; those not named keep theirs."""


def size(d: Dim, sizes: Sizes) -> int:
    """The length of a dimension when its leaves have new sizes."""
    d = find(d)
    if d.kind == "leaf":
        return sizes.get(d, d.size)
    found = [size(p, sizes) for p in d.parts]
    return sum(found) if d.kind == "concat" else math.prod(found)


def shape(dims: Dims, sizes: Sizes) -> tuple[int, ...]:
    """The shape when the leaves have new sizes."""
    return tuple(size(d, sizes) for d in dims)


def _positions(d: Dim, at_leaf: Callable[[Dim], np.ndarray], missing: int, sizes: Sizes) -> np.ndarray:
    """What a leaf says of its own positions, spread over those of the term; ``missing`` where it has no say."""
    d = find(d)
    if d.kind == "leaf":
        return at_leaf(d)
    if d.kind == "order":
        # Where less than all positions are there, they are of one leaf, whichever they are.
        inner = at_leaf(find(d.parts[0]))
        return inner[d.order] if len(inner) == d.size else inner
    found = [_positions(p, at_leaf, missing, sizes) for p in d.parts]
    if d.kind == "concat":
        return np.concatenate(found)
    result = found[0]
    for p in found[1:]:
        result = np.where((result == missing)[:, None], p[None, :], result[:, None]).reshape(-1)
    return result


def index_of(d: Dim, leaf: Dim, sizes: Sizes | None = None) -> np.ndarray:
    """For each position along ``d``, the index inside ``leaf``, or -1 where another leaf stands."""
    sizes = sizes or {}

    def at_leaf(x: Dim) -> np.ndarray:
        n = sizes.get(x, x.size)
        return np.arange(n) if x is leaf else np.full(n, -1)

    return _positions(d, at_leaf, -1, sizes)


def kept_positions(d: Dim, kept: Mapping[Dim, np.ndarray]) -> np.ndarray:
    """The positions along ``d`` that stay when each leaf keeps the given indices."""
    d = find(d)
    if d.kind == "leaf":
        return kept[d] if d in kept else np.arange(d.size)
    if d.kind == "order":
        return np.flatnonzero(np.isin(np.asarray(d.order), kept_positions(d.parts[0], kept)))
    found = [kept_positions(p, kept) for p in d.parts]
    if d.kind == "concat":
        starts = np.cumsum([0, *(p.size for p in d.parts)])
        return np.concatenate([start + x for start, x in zip(starts, found, strict=False)])
    result = found[0]
    for p, x in zip(d.parts[1:], found[1:], strict=True):
        result = (result[:, None] * p.size + x[None, :]).reshape(-1)
    return result


def repeated(d: Dim) -> list[Dim]:
    """Leaves that occur in two factors of one product: no index map can name them."""
    d = find(d)
    if d.kind == "leaf":
        return []
    found = [leaf for p in d.parts for leaf in repeated(p)]
    if d.kind == "product":
        seen: set[Dim] = set()
        for p in d.parts:
            own = set(leaves(p))
            found += [leaf for leaf in own if leaf in seen]
            seen |= own
    return found
