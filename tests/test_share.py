"""Codebooks of scalars: near the optimum, and the optimum."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jcompress as jc
from jcompress.formats.codebook import cluster_totals
from jcompress.share.intervals import best_intervals
from jcompress.share.optimal import optimal_codebook

KMeans = jc.share.KMeans


def error_of(values, codebook):
    return float((np.abs(np.asarray(values, np.float64)[:, None] - np.asarray(codebook, np.float64)) ** 2).min(1).sum())


def best_by_enumeration(values, clusters):
    """The least error over all ways to cut the sorted values into intervals."""
    x = np.sort(np.asarray(values, np.float64))
    best = np.inf
    for cuts in itertools.combinations(range(1, x.size), clusters - 1):
        best = min(best, sum(np.square(p - p.mean()).sum() for p in np.split(x, cuts)))
    return best


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-30, 30), min_size=5, max_size=11), st.integers(1, 4))
def test_the_exact_optimum_equals_enumeration(values, clusters):
    found = error_of(values, optimal_codebook(np.array(values, np.float32), clusters))
    np.testing.assert_allclose(found, best_by_enumeration(values, clusters), atol=1e-3)


def test_lloyd_never_beats_the_exact_optimum_and_comes_near(rng):
    w = jnp.asarray(rng.normal(size=3000), jnp.float32)
    exact, lloyd = (error_of(w, KMeans(clusters=8, exact=e)(w).codebook) for e in (True, False))
    assert exact <= lloyd * (1 + 1e-6)
    assert lloyd < 1.2 * exact


WEIGHTS = {
    "normal": lambda rng: rng.normal(size=(96, 64)),
    "heavy tails": lambda rng: rng.standard_t(2, size=(96, 64)),
    "far outliers": lambda rng: rng.normal(size=(96, 64)) * np.where(rng.random((96, 64)) < 1e-3, 1e4, 1.0),
    "around one": lambda rng: 1 + 0.01 * rng.normal(size=(96, 64)),
    "two crowds": lambda rng: np.where(rng.random((96, 64)) < 0.5, 3 + 1e-3 * rng.normal(size=(96, 64)), 0.1),
    "integers": lambda rng: rng.integers(-300, 300, size=(96, 64)),
    "of 16 bits": lambda rng: np.asarray(jnp.asarray(rng.normal(size=(96, 64)), jnp.bfloat16), np.float32),
}


@pytest.mark.parametrize("clusters", [16, 256])
def test_the_error_is_within_a_percent_of_the_least(rng, clusters):
    fit = jax.jit(KMeans(clusters))
    for name, draw in WEIGHTS.items():
        w = np.asarray(draw(rng), np.float32)
        least = error_of(w.ravel(), optimal_codebook(w, clusters))
        assert error_of(w.ravel(), fit(w).codebook) <= 1.01 * least + 1e-9 * np.square(w).sum(), name


def test_it_is_as_good_for_slices_of_a_scan_and_a_vmap(rng):
    w = jnp.asarray(rng.standard_t(3, size=(2, 64, 48)), jnp.float32)
    least = [error_of(x.ravel(), optimal_codebook(x, 12)) for x in w]
    many = jax.vmap(KMeans(12))(w).codebook
    _, scanned = jax.lax.scan(lambda carry, x: (carry, KMeans(12)(x).codebook), 0, w)
    for found in (many, scanned):
        for x, codebook, best in zip(w, found, least, strict=True):
            assert error_of(x.ravel(), codebook) <= 1.01 * best


def test_intervals_of_points_are_the_best(rng):
    points, weight = np.sort(rng.normal(size=32)).astype(np.float32), rng.integers(1, 9, size=32).astype(np.float32)
    weight[20:] = 0
    values = np.repeat(points[:20], weight[:20].astype(int))
    for clusters in (1, 2, 5, 20, 24):
        place = np.repeat(
            best_intervals(jnp.asarray(points), jnp.asarray(weight), clusters)[:20], weight[:20].astype(int)
        )
        error = sum(np.square(own - own.mean()).sum() for own in (values[place == k] for k in np.unique(place)))
        assert len(np.unique(place)) <= clusters
        np.testing.assert_allclose(error, error_of(values, optimal_codebook(values, clusters)), rtol=1e-4, atol=1e-6)


def test_lloyd_stops_at_a_fixed_point(rng):
    w = jnp.asarray(rng.normal(size=2000), jnp.float32)
    node = KMeans(clusters=8, iterations=10_000)(w)
    for j, value in enumerate(np.asarray(node.codebook)):
        members = np.asarray(w)[np.asarray(node.indices) == j]
        np.testing.assert_allclose(value, members.mean(), atol=1e-4)
    nearest = np.abs(np.asarray(w)[:, None] - np.asarray(node.codebook)).argmin(1)
    assert (nearest == np.asarray(node.indices)).mean() > 0.999


def test_error_falls_with_the_number_of_values(rng):
    w = rng.normal(size=500).astype(np.float32)
    errors = [error_of(w, optimal_codebook(w, k)) for k in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    np.testing.assert_allclose(errors[0], np.square(w - w.mean()).sum(), rtol=1e-4)


def test_planted_values_are_recovered(rng):
    values = np.array([-3.0, -0.5, 0.25, 2.0], np.float32)
    w = jnp.asarray(rng.choice(values, size=(30, 20)))
    for exact in (True, False):
        node = KMeans(clusters=4, exact=exact)(w)
        np.testing.assert_allclose(node.materialize(), w, atol=1e-6)


def test_fewer_distinct_values_than_clusters_are_exact():
    w = jnp.array([1.0, 1.0, 2.0, 2.0])
    for exact in (True, False):
        np.testing.assert_array_equal(KMeans(clusters=16, exact=exact)(w).materialize(), w)


def test_only_kept_weights_count_inside_a_mask(rng):
    w = jnp.asarray(rng.normal(size=(40, 25)), jnp.float32)
    node = jc.chain(jc.prune.Magnitude(sparsity=0.8), KMeans(clusters=4, exact=True))(w)
    kept = np.asarray(w)[np.asarray(node.mask)]
    np.testing.assert_allclose(np.sort(node.values.codebook), optimal_codebook(kept, 4), atol=1e-6)
    assert float(jnp.abs(node.values.codebook).min()) > 0.5  # no value is spent on zero


def test_one_codebook_for_all_leaves_of_a_rule(rng):
    params = {k: jnp.asarray(s * rng.normal(size=(50, 4)), jnp.float32) for k, s in (("a", 1.0), ("b", 3.0))}
    for exact in (True, False):
        plan = jc.plan(params, [(".*", KMeans(clusters=8, scope="global", exact=exact))])
        small = jc.compress(params, plan)
        assert small["b"].codebook == jc.formats.Reference("a/codebook", sizes=(8,))
        np.testing.assert_array_equal(small["a"].codebook, jc.untie(small)["b"].codebook)
        assert jc.nbits(small) == 3 * 400 + 32 * 8
        both = jnp.concatenate([params["a"].ravel(), params["b"].ravel()])
        np.testing.assert_allclose(small["a"].codebook, KMeans(clusters=8, exact=exact)(both).codebook, atol=1e-4)


def test_the_rate_of_deep_compression():
    """16 weights of 32 bits in 4 shared values: n b / (n log2 k + k b) = 3.2 (Han et al. 2016, section 3)."""
    w = jnp.arange(16.0).reshape(4, 4)
    node = KMeans(clusters=4)(w)
    assert 16 * 32 / node.nbits() == 3.2


def test_centroid_gradients_are_sums_over_their_cluster(rng):
    w = jnp.asarray(rng.normal(size=(10, 6)), jnp.float32)
    upstream = jnp.asarray(rng.normal(size=(10, 6)), jnp.float32)
    train, held = jc.split(KMeans(clusters=4)(w))
    gradient = jax.grad(lambda t: (jc.merge(t, held).materialize() * upstream).sum())(train).codebook
    want = [np.asarray(upstream)[np.asarray(held.indices) == j].sum() for j in range(4)]
    np.testing.assert_allclose(gradient, want, rtol=1e-5)


def test_exact_under_jit_says_why_not():
    with pytest.raises(ValueError, match=r"KMeans\(exact=True\) reads the values, so it works outside jit only"):
        jax.jit(KMeans(clusters=4, exact=True))(jnp.arange(9.0))


@pytest.mark.parametrize(
    "kwargs", [{"clusters": 0}, {"clusters": 65_537}, {"clusters": 2.5}, {"scope": "all"}, {"iterations": -1}]
)
def test_bad_hyperparameters(kwargs):
    with pytest.raises(ValueError, match="KMeans"):
        KMeans(**kwargs)


@pytest.mark.parametrize(
    ("clusters", "leaves", "dtype"), [(16, 1, "float32"), (256, 1, "bfloat16"), (300, 3, "float32")]
)
def test_memory_is_at_most_three_times_the_leaves(clusters, leaves, dtype):
    like = {f"w{i}": jax.ShapeDtypeStruct((512, 768), dtype) for i in range(leaves)}
    plan = jc.plan(like, [(".*", KMeans(clusters, scope="leaf" if leaves == 1 else "global"))])
    program = jax.jit(lambda p: jc.compress(p, plan)).lower(like).compile()
    given = sum(x.size * x.dtype.itemsize for x in like.values())
    assert program.memory_analysis().temp_size_in_bytes <= 3 * given


def test_totals_by_pieces_are_totals(rng):
    for shape in ((9000,), (131, 64), (64, 131), (3, 3, 24, 32), (4099,), (2, 4096)):
        x, index = rng.normal(size=shape), rng.integers(0, 7, size=shape)
        shown = rng.random(shape) < 0.5
        for where in (None, shown):
            kept = np.ones(shape, bool) if where is None else where
            total, count = cluster_totals(jnp.asarray(x, jnp.float32), jnp.asarray(index), 7, where)
            np.testing.assert_array_equal(count, np.bincount(index[kept], minlength=7))
            np.testing.assert_allclose(total, np.bincount(index[kept], x[kept], 7), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("scale", [3e38, 1e30, 1e-30])
def test_codebooks_of_extreme_values(scale, exact, rng):
    x = rng.uniform(-1, 1, size=400)

    def error(scale):
        found = KMeans(clusters=8, exact=exact)(jnp.asarray(scale * x, jnp.float32)).materialize()
        return np.square(np.asarray(found, np.float64) / scale - x).sum()

    np.testing.assert_allclose(error(scale), error(1.0), rtol=1e-3)  # bins lie elsewhere: as good, not the same


def test_many_leaves_share_one_program():
    def loops(number):
        like = {f"layer{i}": jax.ShapeDtypeStruct([(40, 120), (8,)][i % 2], jnp.float32) for i in range(number)}
        plan = jc.plan(like, [(".*", KMeans(clusters=20, scope="global"))])
        return jax.jit(lambda p: jc.compress(p, plan)).lower(like).compile().as_text().count(" while(")

    assert loops(64) == loops(32)
