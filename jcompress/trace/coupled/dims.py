"""Dimensions as terms: a leaf, a concatenation or a product of others, unified like types.

Two dimensions that an operation ties become one. A reshape factors, a slice or a concatenation splits, and what
cannot be told apart any more is pinned with a reason: its size stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np


class ClashError(Exception):
    """Two terms that cannot be one; the message says why."""


class Dim:
    """A dimension: a leaf of some size, or a term over other dimensions.

    Attributes:
      size: its length in the traced program.
      kind: ``"leaf"``, ``"concat"``, ``"product"``, or ``"link"`` to what it was unified with.
      parts: what it is made of, the outermost factor first.
      pinned: for a leaf, why its size must not change, or None.
    """

    __slots__ = ("kind", "parts", "pinned", "size")

    def __init__(self, size: int, kind: str = "leaf", parts: Sequence[Dim] = (), pinned: str | None = None) -> None:
        self.size, self.kind, self.parts, self.pinned = size, kind, tuple(parts), pinned

    def __repr__(self) -> str:
        d = find(self)
        if d.kind == "leaf":
            return f"{d.size}{'!' if d.pinned else ''}"
        return f"({(' + ' if d.kind == 'concat' else ' * ').join(map(repr, d.parts))})"


Dims = tuple[Dim, ...]


def fresh(shape: Sequence[int], pinned: str | None = None) -> Dims:
    """A leaf for each length."""
    return tuple(Dim(int(n), pinned=pinned) for n in shape)


def find(d: Dim) -> Dim:
    """What a dimension stands for now."""
    while d.kind == "link":
        (target,) = d.parts
        if target.kind == "link":
            d.parts = target.parts  # shortens the next search
        d = target
    return d


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
    d, sizes = find(d), [int(n) for n in sizes]
    if 0 in sizes:
        left = as_concat(d, [n for n in sizes if n]) if d.size else []
        return [left.pop(0) if n else Dim(0) for n in sizes]
    if len(sizes) == 1:
        return [d]
    if d.kind == "leaf":
        return _turn(d, "concat", sizes)
    if d.kind == "product":
        factors = flat(d, "product")
        inner = math.prod(f.size for f in factors[1:])
        if any(n % inner for n in sizes):
            raise ClashError(f"a slice at {sizes} cuts through the factors {d}")
        outer = as_concat(factors[0], [n // inner for n in sizes])
        return [product([o, *factors[1:]]) for o in outer]
    return _regroup(flat(d, "concat"), sizes)


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
    d, sizes = find(d), [int(n) for n in sizes]
    wanted = [n for n in sizes if n != 1]
    if len(wanted) <= 1:
        found = [d] if wanted else []
    elif d.kind == "leaf":
        found = _turn(d, "product", wanted)
    elif d.kind == "product":
        found = _refactor(flat(d, "product"), wanted)
    else:
        found = _factor_concat(flat(d, "concat"), wanted)
    return [found.pop(0) if n != 1 else Dim(1) for n in sizes]


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
