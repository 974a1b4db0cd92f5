"""What a function and its parameters cost at other sizes of its groups, as polynomials read off its dimensions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from jcompress import core
from jcompress.layers.counts import Count, Polynomial
from jcompress.trace import primitives
from jcompress.trace.core.bodies import Bodies
from jcompress.trace.core.contraction import Dot, Product
from jcompress.trace.core.kinds import Contraction
from jcompress.trace.costs import operations
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled.dims import Dim, Dims
from jcompress.trace.coupled.frames import NOWHERE, At, Frame, Site
from jcompress.trace.coupled.slices import Asked, counted

Names = Mapping[Dim, str]
"""The groups by the leaf that each is."""


def length(d: Dim, names: Names, at: At = NOWHERE, summed: At = NOWHERE) -> Polynomial:
    """The length of a dimension in the sizes of the groups on it.

    Args:
      d: the dimension.
      names: of the groups.
      at: those of which there is one slice only.
      summed: those whose slices alone are meant, without what stands beside them.
    """
    d = terms.find(d)
    if d.kind == "leaf":
        return {(): 1} if d in at else {(names[d],): 1} if d in names and not d.pinned else {(): d.size}
    own = summed.intersection(terms.leaves(d))
    parts = [p for p in d.parts if d.kind != "concat" or own <= set(terms.leaves(p))]
    found = [length(p, names, at, own) for p in parts]
    return _sum(found) if d.kind == "concat" else _product(found)


def _sum(parts: Iterable[Polynomial]) -> Polynomial:
    total: Counter[tuple[str, ...]] = Counter()
    for part in parts:
        total.update(part)
    return total


def _product(parts: Iterable[Polynomial]) -> Polynomial:
    total: Polynomial = {(): 1}
    for part in parts:
        product: Counter[tuple[str, ...]] = Counter()
        for names, c in total.items():
            for others, d in part.items():
                product[tuple(sorted(names + others))] += c * d
        total = product
    return total


def parameter_bytes(params: Iterable[Any], dims: Iterable[Dims], names: Names) -> Count:
    """The bytes of parameters, from their shapes and dimensions."""
    bits = [
        _product([{(): core.dtype_bits(x.dtype)}, *(length(a, names) for a in d)])
        for x, d in zip(params, dims, strict=True)
    ]
    return Count(_sum(bits), _sizes(names), unit=8)


def multiply_adds(frame: Frame, names: Names, asked: Asked) -> Count:
    """The multiply-adds of all products in a frame and in what it calls, as ``jc.trace.cost`` counts them."""
    found: dict[tuple[str, ...], list[Polynomial]] = {(): []}
    choices: list[tuple[Count, ...]] = []
    _gather(frame, names, asked, 1, found, choices)
    whole, *shared = ((cut, _sum(parts)) for cut, parts in found.items())
    return Count(whole[1], _sizes(names), tuple(choices), shared=dict(shared))


def _sizes(names: Names) -> dict[str, int]:
    return {name: leaf.size for leaf, name in names.items()}


def _gather(frame: Frame, names: Names, asked: Asked, times: int, found: dict, choices: list) -> None:
    for site in (*frame.fixed, *frame.sites):
        row = primitives.row(site.eqn)
        flow = row.flow
        for at, summed in [(NOWHERE, NOWHERE), *asked.get(id(site), ())]:
            own = found.setdefault(tuple(sorted(names[leaf] for leaf in at)), [])
            if row.count is operations.fourier:
                own.append(_product([{(): times}, *_transform(site, names, at)]))
            if isinstance(flow, Contraction):
                own.append(_product([{(): times}, *_factors(site, flow.of(site.eqn, 0), names, at, summed)]))
        if isinstance(flow, Bodies) and flow.is_choice:
            branches = [multiply_adds(branch, names, asked) for branch in counted(site)]
            choices.append(tuple(_times(branch, times) for branch in branches))
        elif isinstance(flow, Bodies):
            turns = flow.times(site.eqn)
            for inside in counted(site):
                _gather(inside, names, asked, times * (1 if turns is None else turns), found, choices)


def _times(count: Count, times: int) -> Count:
    scaled, *shared = (
        {names: c * times for names, c in terms.items()} for terms in (count.terms, *count.shared.values())
    )
    inner = tuple(tuple(_times(branch, times) for branch in branches) for branches in count.choices)
    return Count(scaled, count.sizes, inner, shared=dict(zip(count.shared, shared, strict=True)))


def _transform(site: Site, names: Names, at: At) -> list[Polynomial]:
    """The lengths whose product is the number of multiply-adds of a Fourier transform."""
    (dims,) = site.ins
    each = operations.fourier(site.eqn)[0] // 2 // max(math.prod(d.size for d in dims), 1)
    return [{(): each}, *(length(d, names, at) for d in dims)]


def _factors(site: Site, product: Product, names: Names, at: At, summed: At) -> list[Polynomial]:
    """The lengths whose product is the number of multiply-adds of a product or a convolution."""
    (out,), ins = site.outs, site.ins
    if isinstance(product, Dot):
        moving, over = list(out), [ins[product.side][a] for a in product.contracted]
    else:
        numbers = site.params["dimension_numbers"]
        moving = [out[numbers.out_spec[0]], out[numbers.out_spec[1]]]
        over = [ins[1][numbers.rhs_spec[1]]]
    still = product.multiply_adds() // max(math.prod(d.size for d in (*moving, *over)), 1)
    made = at - summed
    return [{(): still}, *(length(d, names, made) for d in moving), *(length(d, names, at, summed) for d in over)]
