"""Choice of ranges, against sorts, literal loops, closed forms and Monte Carlo."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import jcompress as jc
from jcompress.quantize import densities, grids

Q, R = jc.quantize, jc.quantize.ranges
Int = Q.Int


def weights(shape=(64, 6), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def fit(method, w, **known):
    return jax.jit(lambda w: method(w, jc.Context(**known)))(w)


@pytest.mark.parametrize("percent", [50.0, 90.0, 98.5, 100.0])
def test_percentiles_cut_off_an_exact_number(percent):
    w = weights((400, 3)).at[7].set(0.0)
    node = fit(Int(8, clip=R.Percentile(percent)), w)
    outside = math.floor(400 * (1 - percent / 100) + 1e-9)
    ordered = np.sort(np.abs(np.asarray(w)), 0)[::-1]
    np.testing.assert_allclose(node.scale[0] * 127, ordered[outside], rtol=1e-6)
    groups = fit(Int(8, group_size=100, clip=R.Percentile(percent)), w)
    ordered = np.sort(np.abs(np.asarray(w)).reshape(4, 100, 3), 1)[:, ::-1]
    np.testing.assert_allclose(groups.scale * 127, ordered[:, math.floor(100 - percent + 1e-9)], rtol=1e-6)


def test_percentiles_at_both_ends_and_under_a_mask():
    w = weights((200, 2)) + 0.5
    node = fit(Int(8, symmetric=False, axis=None, clip=R.Percentile(95.0)), w)
    ordered = np.sort(np.asarray(w).ravel())
    np.testing.assert_allclose(float(node.scale[0, 0]) * 255, ordered[-21] - ordered[20], rtol=1e-5)
    shown = w > 0.8
    node = fit(Int(8, axis=None, clip=R.Percentile(90.0)), w, where=shown)
    visible = np.sort(np.asarray(w)[np.asarray(shown)])
    outside = math.floor(len(visible) * 0.1 + 1e-9)
    np.testing.assert_allclose(float(node.scale[0, 0]) * 127, visible[-1 - outside], rtol=1e-6)
    positive = fit(Int(8, symmetric=False, axis=None, clip=R.Percentile(90.0)), jnp.abs(w) + 1)
    assert int(positive.zero[0, 0]) == 0
    with pytest.raises(ValueError, match=r"outside \(0, 100\]"):
        R.Percentile(0)


@pytest.mark.parametrize(
    "method",
    [Q.Float4(axis=None, clip="mse"), Q.NF4(None, axis=None, clip="mse"), Q.PowersOfTwo(3, axis=None, clip="mse")],
    ids=lambda m: type(m).__name__,
)
def test_least_squared_error_for_grids_that_are_not_uniform(method):
    """Against the same grid at two thousand fixed ranges."""
    w = weights((300, 1), seed=2).at[0].set(6.0)

    def error(node):
        return jnp.square(node.materialize() - w).sum()

    plain = type(method)(**{**vars(method), "clip": "minmax"})

    def fixed(part):
        return error(type(method)(**{**vars(method), "clip": R.Fixed(None, part * 6.0)})(w))

    best = jax.jit(lambda parts: jax.lax.map(fixed, parts, batch_size=100))(jnp.linspace(0.05, 1, 2000)).min()
    found = float(error(fit(method, w)))
    assert found <= 1.02 * float(best)
    assert found < float(error(fit(plain, w)))


def test_more_candidates_than_one_never_hurt():
    w = weights((256, 4), seed=1).at[0].mul(5.0)
    errors = [
        float(jnp.square(fit(Int(3, clip=clip), w).materialize() - w).sum())
        for clip in ("minmax", R.MSE(candidates=4), R.MSE(candidates=200))
    ]
    assert errors == sorted(errors, reverse=True)
    np.testing.assert_array_equal(fit(Int(3, clip=R.MSE()), w).codes, fit(Int(3, clip="mse"), w).codes)


def test_published_clips_of_laplace_and_gaussian():
    """Banner et al. 2019, arXiv:1810.05723: 2, 3 and 4 bits, ``2**bits`` steps."""
    for density, known in (("laplace", (2.83, 3.89, 5.03)), ("gaussian", (1.71, 2.15, 2.55))):
        found = [densities.optimal_clip(density, 2**bits) for bits in (2, 3, 4)]
        np.testing.assert_allclose(found, known, atol=0.01)
    steps = np.array([2, 6, 14, 30, 254])
    lambert = scipy.special.lambertw(3 * steps**2).real
    np.testing.assert_allclose([densities.optimal_clip("laplace", n) for n in steps], lambert, rtol=1e-9)


@pytest.mark.parametrize("density", ["laplace", "gaussian"])
@pytest.mark.parametrize("steps", [8, 14, 30])
def test_the_expected_error_of_a_clip_is_what_samples_show(density, steps):
    rng = np.random.default_rng(0)
    x = rng.laplace(size=2_000_000) if density == "laplace" else rng.normal(size=2_000_000)

    def sampled(a):
        step = 2 * a / steps
        return np.square(x - np.clip(np.round(x / step) * step, -a, a)).mean()

    best = densities.optimal_clip(density, steps)
    for a in (0.6 * best, best, 1.5 * best):
        assert abs(sampled(a) / densities.clip_error(density, a, steps) - 1) < 0.08
    assert sampled(best) < 1.01 * min(sampled(a) for a in np.linspace(0.5, 2, 31) * best)


def test_clips_from_a_fitted_density():
    rng = np.random.default_rng(1)
    x = jnp.asarray(0.3 * rng.laplace(size=(20_000, 2)), jnp.float32)
    node = fit(Int(4, clip=R.ACIQ("laplace")), x)
    mean = np.abs(np.asarray(x)).mean(0)
    np.testing.assert_allclose(node.scale[0] * 7, scipy.special.lambertw(3 * 14**2).real * mean, rtol=1e-4)
    least = fit(Int(4, clip="mse"), x)
    errors = [float(jnp.square(n.materialize() - x).sum()) for n in (node, least, fit(Int(4), x))]
    assert errors[1] <= errors[0] * 1.001 < 1.03 * errors[1] < errors[2]
    shifted = fit(Int(4, symmetric=False, axis=None, clip=R.ACIQ("gaussian")), weights((5000, 2)) + 4)
    a = densities.optimal_clip("gaussian", 15)
    np.testing.assert_allclose(float(shifted.scale[0, 0]) * 15, 4 + a, atol=0.1)  # from 0, which is always inside


def literal_divergence(histogram, levels):
    """The slides' loop, written out: the kept number of bins, and the divergence at each."""
    found = {}
    for i in range(levels, len(histogram) + 1):
        p = histogram[:i].astype(np.float64)
        p[-1] += histogram[i:].sum()
        q = np.zeros(i)
        edges = [(g * i + levels // 2) // levels for g in range(levels + 1)]
        for a, b in itertools.pairwise(edges):
            filled = p[a:b] > 0
            if filled.any():
                q[a:b][filled] = histogram[a:b].sum() / filled.sum()
        p, q = p / p.sum(), q / max(q.sum(), 1e-30)
        with np.errstate(divide="ignore"):
            found[i] = (p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum()
    return found


DRAWS = {
    "normal": lambda rng: rng.normal(size=4000),
    "laplace": lambda rng: rng.laplace(size=4000),
    "outlier": lambda rng: np.append(rng.normal(size=3999), 30.0),
    "relu": lambda rng: np.maximum(rng.normal(size=200_000), 0),
    "sparse": lambda rng: rng.normal(size=50_000) * (rng.random(50_000) < 0.05),
    "cauchy": lambda rng: rng.standard_cauchy(size=20_000),
    "lognormal": lambda rng: rng.lognormal(size=200_000),
    "exponential": lambda rng: rng.exponential(size=300_000),
    "two values": lambda rng: rng.choice([1.0, 5.0], 10_000),
    "few": lambda rng: rng.normal(size=30),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_divergence_is_that_of_the_literal_loop(draw):
    x = np.abs(DRAWS[draw](np.random.default_rng(0)))
    histogram = np.histogram(x, 256, (0, x.max()))[0]
    known = literal_divergence(histogram, 8)
    kept = int(jax.jit(densities._kept_bins, static_argnums=1)(jnp.asarray(histogram, jnp.uint32), 8))
    assert known[kept] <= min(known.values()) + 1e-5
    node = fit(Int(4, axis=None, clip=R.KL(bins=256)), jnp.asarray(x[:, None], jnp.float32))
    inside = round(float(node.scale[0, 0]) * 7 / x.max() * 256)
    assert known[inside] <= min(known.values()) + 1e-3  # bin edges may round otherwise in float32
    assert draw != "outlier" or inside < 64


def test_divergence_of_many_entries_that_fall_off_fast():
    # Far out, levels hold a few of 200,000 entries: less than the rounding of running sums in float32.
    x = np.maximum(np.random.default_rng(0).normal(size=200_000), 0).astype(np.float32) ** 3
    histogram = np.bincount(np.minimum((np.abs(x) / x.max() * np.float32(2048)).astype(int), 2047), minlength=2048)
    known = literal_divergence(histogram, 128)
    best = min(known, key=known.get)
    scale = fit(Int(8, axis=None, clip=R.KL()), jnp.asarray(x[:, None])).scale
    assert float(scale[0, 0]) * 127 == pytest.approx(best / 2048 * x.max(), rel=1e-3)


def test_a_uniform_histogram_keeps_the_full_range():
    x = jnp.linspace(-1, 1, 4097)[:, None]
    assert float(fit(Int(4, axis=None, clip=R.KL(bins=128)), x).scale[0, 0]) == pytest.approx(1 / 7)
    two = jnp.concatenate([x, 5 * x], 1)
    np.testing.assert_allclose(fit(Int(4, clip=R.KL(bins=128)), two).scale[0], [1 / 7, 5 / 7], rtol=1e-6)


def test_histograms_leave_hidden_entries_out():
    w = weights((64, 2))
    shown = jnp.abs(w) < 1
    problem = grids.pose(Int(4), w, jc.Context(where=shown), Int(4)._grid())
    counts = densities._histogram(problem, problem.full().high, 128)
    np.testing.assert_array_equal(counts.sum(1), shown.sum(0))


def test_moving_averages_are_weighted_means_of_what_was_seen():
    observer = R.MovingAverage(decay=0.8, axis=-1)
    batches = [weights((5, 7, 3), seed) for seed in range(4)]
    state, update = observer.init(3), jax.jit(observer.update)
    for x in batches:
        state = update(state, x)
    share = np.array([0.8 ** (3 - i) for i in range(4)])
    share /= share.sum()
    found = observer.range(state)
    np.testing.assert_allclose(
        found.low, sum(s * x.min((0, 1)) for s, x in zip(share, batches, strict=True)), rtol=1e-5
    )
    np.testing.assert_allclose(
        found.high, sum(s * x.max((0, 1)) for s, x in zip(share, batches, strict=True)), rtol=1e-5
    )
    node = Int(8, symmetric=False, clip=found)(batches[0][0])
    np.testing.assert_allclose(node.scale[0], (found.high - found.low) / 255, rtol=1e-6)
    np.testing.assert_allclose(
        Int(8, clip=found)(batches[0][0]).scale[0] * 127, jnp.maximum(-found.low, found.high), rtol=1e-6
    )
    with pytest.raises(ValueError, match="decay=1 is outside"):
        R.MovingAverage(1)


def test_ranges_that_a_grid_cannot_have():
    with pytest.raises(ValueError, match=r"KL.* serves symmetric grids of integers only"):
        Int(4, symmetric=False, clip=R.KL())
    with pytest.raises(ValueError, match=r"ACIQ.* serves grids of integers only"):
        Q.NF4(clip=R.ACIQ())
    with pytest.raises(ValueError, match="clip='kl' is unknown"):
        Q.Float8(clip="kl")
    with pytest.raises(ValueError, match="density='cauchy' is unknown"):
        R.ACIQ("cauchy")
    with pytest.raises(ValueError, match="bins=8 must be at least 128"):
        R.KL(bins=8)
