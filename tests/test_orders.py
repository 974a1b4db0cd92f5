"""Dimensions in another order: an order goes through reshapes and slices where it does not mix their parts."""

import numpy as np
import pytest

from jcompress.trace.coupled import dims, orders


def leaf(size):
    return dims.fresh([size])[0]


def test_an_order_and_back_is_the_same_dimension():
    d, order = leaf(6), np.array([3, 1, 4, 0, 5, 2])
    there = dims.reordered(d, order)
    assert dims.index_of(there, d).tolist() == order.tolist()
    assert dims.reordered(there, np.argsort(order)) is d
    assert dims.kept_positions(there, {d: np.array([0, 1, 2])}).tolist() == [1, 3, 5]


def test_a_dimension_and_its_own_order_are_pinned():
    d = leaf(4)
    dims.unify(d, dims.reordered(d, np.array([1, 0, 3, 2])))
    assert "part of itself" in d.pinned


def test_two_orders_meet_in_a_third():
    a, b = leaf(4), leaf(4)
    first, second = np.array([1, 2, 3, 0]), np.array([3, 1, 0, 2])
    dims.unify(dims.reordered(a, first), dims.reordered(b, second))
    left, right = (dims.index_of(dims.reordered(*pair), dims.find(b)) for pair in ((a, first), (b, second)))
    assert left.tolist() == right.tolist() and not dims.find(b).pinned


def test_backwards_goes_through_reshapes_and_slices():
    d = leaf(6)
    back = dims.reordered(d, np.arange(6)[::-1])
    first, second = dims.as_concat(back, [2, 4])
    assert dims.index_of(dims.find(d), dims.find(second.parts[0]) if second.kind == "order" else second).max() == 3
    assert first.size == 2 and not any(x.pinned for x in dims.leaves(d))
    e = leaf(6)
    rows, columns = dims.as_product(dims.reordered(e, np.arange(6)[::-1]), [2, 3])
    assert (rows.kind, columns.kind) == ("order", "order")
    assert [x.size for x in dims.flat(e, "product")] == [2, 3]


def test_a_shuffle_turns_the_factors_about():
    d = leaf(6)
    shuffled = dims.reordered(d, np.arange(6).reshape(2, 3).T.reshape(-1))
    assert [x.size for x in dims.as_product(shuffled, [3, 2])] == [3, 2]
    assert [x.size for x in dims.flat(d, "product")] == [2, 3]
    groups, channels = dims.flat(d, "product")
    assert dims.flat(shuffled, "product") == [channels, groups]


def test_an_order_that_mixes_what_a_reshape_splits_is_pinned():
    d = leaf(6)
    mixed = dims.reordered(d, np.array([0, 3, 1, 2, 5, 4]))
    dims.as_product(d, [2, 3])
    assert all(x.pinned for x in (*dims.leaves(d), *dims.leaves(mixed)))
    with pytest.raises(dims.ClashError):
        dims.as_concat(dims.reordered(leaf(6), np.array([0, 3, 1, 2, 5, 4])), [2, 4])


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2), (2, 3, 2)])
def test_factors_and_turns_are_found(sizes):
    rng, n = np.random.default_rng(0), int(np.prod(sizes))
    each = [rng.permutation(size) for size in sizes]
    table = np.arange(n).reshape(sizes)[np.ix_(*each)].reshape(-1)
    assert [x.tolist() for x in orders.factors(table, sizes)] == [x.tolist() for x in each]
    about = np.arange(n).reshape(sizes[0], -1).T.reshape(-1)
    assert orders.turned(about, sizes) == 1
    assert orders.factors(np.roll(np.arange(n), 1), sizes) is None
