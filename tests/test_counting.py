"""Counts of more than 32 bits, and arrays of more entries than those can number."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from jcompress.measure.rows import _norms
from jcompress.numeric import counting, threshold
from jcompress.numeric.counting import Count, filled, sums_of
from jcompress.numeric.threshold import keep_largest, keep_random
from jcompress.prune import dynamic
from jcompress.prune.masks import selection

M = jc.prune.Magnitude


def test_sums_of_counts_do_not_wrap(rng):
    numbers = rng.integers(1 << 31, 1 << 32, (50, 70), np.uint32)
    (total,) = jax.jit(lambda x: sums_of([x]))(numbers)
    assert int(total) == numbers.sum(dtype=object)
    room = rng.integers(0, 1 << 32, 40, np.uint32)
    total = int(room[:20].sum(dtype=object)) + 7
    taken = filled(Count.of(total), Count.of(jnp.asarray(room)))
    expected = [*room[:20].tolist(), min(7, int(room[20]))]
    assert [int(Count(*pair)) for pair in zip(*taken, strict=True)][:21] == expected and int(taken.sum()) == total


@pytest.mark.parametrize("number", [jnp.float32(0.3), jnp.float32(1.0), 0.999])
def test_more_than_32_bits_stay(number):
    size = 80 * 8192 * 28672
    found = selection.kept(size, number)
    assert abs(int(found) - (size - round(float(number) * size))) <= size * 2**-24 and int(found) <= size


LARGE = {
    "leaf": lambda p, k: keep_largest([p["a"]], Count(k, k), by=jnp.abs),
    "among": lambda p, k: keep_largest([p["a"]], Count(k, k), among=[p["a"] > 0]),
    "global": lambda p, k: keep_largest(jax.tree.leaves(p), Count(k, k), by=jnp.abs),
    "random": lambda p, k: keep_random(p["a"] > 0, Count(k, k), jax.random.key(0)),
    "momentum": lambda p, k: dynamic.SparseMomentum()(known(p, k), None)[0],
    "thresholds": lambda p, k: dynamic.DSR()(known(p, k), jnp.float32(0.1))[0],
    "plan": lambda p, k: jc.compress(p, jc.plan(p, [(".*", M(sparsity=k / 2.0**32, scope="global"))]), step=0),
    "report": lambda p, k: (p["a"], _norms(p["a"], p["a"])),
}


def known(p, k):
    return [dynamic.Leaf(x, x > 0, x, x, k.astype(jnp.int32), jax.random.key(0)) for x in jax.tree.leaves(p)]


@pytest.mark.parametrize("name", LARGE)
def test_leaves_of_more_entries_than_32_bits_count(name):
    """Shapes of a stack of layers of a model of 70B parameters; nothing is run."""
    p = {"a": jax.ShapeDtypeStruct((80, 8192, 28672), jnp.bfloat16), "b": jax.ShapeDtypeStruct((2**20,), jnp.bfloat16)}
    found = jax.eval_shape(LARGE[name], p, jax.ShapeDtypeStruct((), jnp.uint32))
    assert max(math.prod(x.shape) for x in jax.tree.leaves(found)) == math.prod(p["a"].shape)


@pytest.fixture
def few_are_many(monkeypatch):
    """As if a count of 32 bits ended at some 20."""
    monkeypatch.setattr(counting, "MOST", 20)
    monkeypatch.setattr(threshold, "MOST", 20)
    for call in (threshold._keep, threshold._draw):
        call.clear_cache()
    yield
    for call in (threshold._keep, threshold._draw):
        call.clear_cache()


def test_rows_that_are_counted_apart_give_the_same_masks(few_are_many, rng):
    for shapes in ([(6, 4, 3)], [(30, 2), (5,), (3, 3, 7)], [(90,)]):
        xs = [rng.integers(-3, 4, shape).astype("f4") for shape in shapes]  # mostly ties
        flat = np.concatenate([np.abs(x).reshape(-1) for x in xs])
        order = np.argsort(-flat, kind="stable")
        keep = jax.jit(lambda xs, k: keep_largest(xs, k, by=jnp.abs))
        for count in (0, 1, 7, flat.size // 2, flat.size - 2, flat.size):
            expected = np.zeros(flat.size, bool)
            expected[order[:count]] = True
            found = keep([jnp.asarray(x) for x in xs], jnp.uint32(count))
            assert np.array_equal(np.concatenate([np.asarray(x).reshape(-1) for x in found]), expected), (shapes, count)


def test_rows_that_are_counted_apart_are_drawn_from_alike(few_are_many):
    among = jnp.arange(600).reshape(40, 15) % 3 > 0
    draw = jax.jit(lambda key: keep_random(among, 100, key))
    found = np.stack([draw(key) for key in jax.random.split(jax.random.key(0), 30)])
    assert np.all(found.sum((1, 2)) == 100) and not np.any(found & ~np.asarray(among))
    rows = found.sum((0, 2))  # 75 of each expected
    assert rows.min() > 40 and rows.max() < 110
