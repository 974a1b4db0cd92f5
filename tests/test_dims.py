"""The algebra of dimensions: reshapes and slices factor and split alike, whatever the order in which they are met."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jcompress.trace.coupled import dims


def leaf(size):
    return dims.fresh([size])[0]


def test_a_reshape_and_back_is_the_same_dimension():
    d = leaf(24)
    a, b = dims.as_product(d, [4, 6])
    again = dims.product([a, b])
    dims.unify(d, again)
    assert dims.flat(d, "product") == [a, b]
    assert not a.pinned and not b.pinned


def test_two_ways_to_factor_meet_in_the_finest():
    d = leaf(24)
    x = dims.as_product(d, [4, 6])
    y = dims.as_product(d, [12, 2])
    assert [f.size for f in dims.flat(d, "product")] == [4, 3, 2]
    dims.unify(dims.product(x), dims.product(y))
    assert all(not f.pinned for f in dims.leaves(d))


def test_factors_that_cannot_be_told_apart_are_pinned():
    d, e = leaf(6), leaf(4)
    both = dims.product([d, e])
    other = dims.product(dims.fresh([8, 3]))
    dims.unify(both, other)
    assert all(x.pinned for x in [*dims.leaves(d), *dims.leaves(e)])


def test_slices_at_other_places_meet_in_the_finest():
    d = leaf(10)
    dims.as_concat(d, [4, 6])
    pieces = dims.as_concat(d, [7, 3])
    assert [p.size for p in dims.flat(d, "concat")] == [4, 3, 3]
    assert [p.size for p in pieces] == [7, 3]


def test_a_concatenation_of_halves_that_are_mixed_is_one_leaf_twice():
    half = leaf(4)
    whole = leaf(8)
    first, second = dims.as_concat(whole, [4, 4])
    dims.unify(first, half)
    dims.unify(second, half)
    assert dims.index_of(whole, dims.find(half)).tolist() == [0, 1, 2, 3] * 2
    pair = dims.as_product(whole, [2, 4])
    assert dims.find(pair[1]) is dims.find(half)


def test_a_pin_holds_for_all_that_it_meets():
    d = leaf(6)
    dims.pin([d], "because")
    e = leaf(6)
    dims.unify(e, d)
    parts = dims.as_product(e, [2, 3])
    assert {p.pinned for p in parts} == {"because"}


def test_lengths_that_differ_pin_both():
    a, b = leaf(3), leaf(4)
    dims.unify(a, b)
    assert "lengths 3 and 4" in a.pinned and b.pinned


def test_a_dimension_is_no_part_of_itself():
    d = leaf(4)
    e = dims.concat([d, leaf(0)])
    dims.unify(d, e)
    assert not d.pinned
    grown = dims.Dim(4, "concat", (d, dims.Dim(0)))
    dims.unify(d, grown)
    assert d.pinned


def test_a_leaf_twice_in_one_axis_is_found():
    d, e = leaf(3), leaf(2)
    assert dims.repeated(dims.product([d, e])) == []
    assert dims.repeated(dims.product([d, e, d])) == [d]
    assert dims.repeated(dims.concat([d, d])) == []


@st.composite
def terms(draw, depth=3):
    """A term over a few leaves, and the leaves."""
    pool = [leaf(draw(st.integers(2, 4))) for _ in range(3)]

    def build(depth):
        if depth == 0 or draw(st.booleans()):
            return draw(st.sampled_from(pool))
        make = dims.concat if draw(st.booleans()) else dims.product
        return make([build(depth - 1), build(depth - 1)])

    return build(depth), pool


@given(terms(), st.data())
def test_positions_that_stay_are_those_of_the_array(drawn, data):
    term, pool = drawn
    kept = {}
    for x in pool:
        size = data.draw(st.integers(1, x.size))
        kept[x] = np.sort(data.draw(st.permutations(range(x.size)))[:size])
    sizes = {x: len(index) for x, index in kept.items()}
    positions = dims.kept_positions(term, kept)
    assert len(positions) == dims.size(term, sizes)
    assert len(set(positions.tolist())) == len(positions)
    if not dims.repeated(term):
        stays = np.ones(term.size, bool)
        for x in pool:
            index = dims.index_of(term, x)
            stays &= (index < 0) | np.isin(index, kept[x])
        assert positions.tolist() == np.flatnonzero(stays).tolist()
        for x in pool:
            new = dims.index_of(term, x, sizes)
            old = dims.index_of(term, x)[positions]
            assert [kept[x][i] if i >= 0 else -1 for i in new] == old.tolist()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_any_reshape_of_a_leaf_can_be_undone(shape, data):
    n = math.prod(shape)
    d = leaf(n)
    parts = dims.as_product(d, shape)
    assert [p.size for p in parts] == shape
    assert dims.product(parts).size == n
    divisors = [k for k in range(1, n + 1) if n % k == 0]
    k = data.draw(st.sampled_from(divisors))
    try:
        again = dims.as_product(d, [k, n // k])
    except dims.ClashError:
        return
    assert dims.shape(tuple(again), {}) == (k, n // k)


def test_a_clash_says_what_met():
    d = dims.product(dims.fresh([2, 3]))
    with pytest.raises(dims.ClashError, match="mixes the factors"):
        dims.as_product(d, [3, 2])
