"""The grids of quantizers against published levels, formulas and brute force."""

import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from quantizers import E2M1, E5M2, NF4, integers, scales, signed, weights

import jcompress as jc
from jcompress.quantize import tables

Q = jc.quantize


def fit(method, w, **known):
    return jax.jit(lambda w: method(w, jc.Context(**known)))(w)


def test_nf4_levels_are_the_published_ones():
    np.testing.assert_allclose(tables.normal_levels(4), NF4, atol=3e-7)


@pytest.mark.parametrize(
    ("bits", "terms"),
    [
        (3, [[0, 1, 2]]),
        (4, [[0, 1, 3], [2]]),
        (5, [[0, 2, 4], [1, 3, 5]]),
        (6, [[0, 2, 5], [1, 3, 6], [4]]),
        (7, [[0, 3, 6], [1, 4, 7], [2, 5, 8]]),
    ],
)
def test_additive_levels_are_sums_of_one_power_from_each_term(bits, terms):
    """The exponents that equation (5) of arXiv:1909.13144 and its odd case deal out, written down."""
    sums = {sum(parts) for parts in itertools.product(*([0.0, *(2.0**-e for e in t)] for t in terms))}
    assert len(sums) == 2 ** (bits - 1)
    np.testing.assert_array_equal(tables.additive_levels(bits, 2), signed(sums - {0}))


def test_one_term_of_all_bits_is_powers_of_two():
    np.testing.assert_array_equal(tables.additive_levels(4, 3), signed(2.0 ** -np.arange(7)))


@pytest.mark.parametrize(("dtype", "most"), [("e4m3", 8), ("e5m2", 15), ("e2m1", 2), ("int8", 6)])
def test_block_scales_follow_the_microscaling_rule(dtype, most):
    w = weights((128, 5)) * np.exp2(np.random.default_rng(1).integers(-20, 20, size=(1, 5)))
    node = fit(Q.Microscaling(dtype), w)
    assert node.scale.dtype == jnp.float8_e8m0fnu
    largest = np.abs(np.asarray(w)).reshape(4, 32, 5).max(1)
    np.testing.assert_array_equal(
        np.log2(np.asarray(node.scale.astype(jnp.float32))), np.floor(np.log2(largest)) - most
    )
    # Powers of two, and those next to them, decide by their exponent alone.
    edge = jnp.array([2.0, np.nextafter(np.float32(2), np.float32(0)), np.nextafter(np.float32(2), np.float32(3))])
    found = Q.Microscaling(dtype, group_size=1)(edge[:, None]).scale.astype(jnp.float32)
    assert (np.log2(np.asarray(found))[:, 0] + most).tolist() == [1, 0, 1]


def test_scales_that_are_powers_of_two_are_the_least_that_clip_nothing():
    w = weights() * jnp.exp(weights((1, 6), 1))
    node = fit(Q.Int(4, power_of_two=True), w)
    exponent = np.log2(np.asarray(node.scale.astype(jnp.float32)))
    np.testing.assert_array_equal(exponent, np.ceil(np.log2(np.abs(np.asarray(w)).max(0, keepdims=True) / 7)))
    exact = Q.Int(4, power_of_two=True)(jnp.array([7.0, 1.0]))
    assert exact.scale.astype(jnp.float32).tolist() == [1.0]
    with pytest.raises(ValueError, match="one symmetric bit has no level 0"):
        Q.Int(1, power_of_two=True)


def test_nvfp4_scales_are_nested_and_survive_tiny_blocks():
    w = weights((48, 3)).at[16:32].mul(1e-9)
    node = fit(Q.NVFP4(), w)
    tensor = float(jnp.abs(w).max()) / (6 * 448)
    np.testing.assert_allclose(node.scale.scale, tensor, rtol=1e-6)
    blocks = np.abs(np.asarray(w)).reshape(3, 16, 3).max(1) / 6 / tensor
    want = np.maximum(blocks.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), 2.0**-9)
    np.testing.assert_array_equal(node.scale.codes.astype(jnp.float32), want)
    assert not node.materialize()[16:32].any()
    train, held = jc.split(node)
    assert train.scale.scale is not None
    assert held.scale.codes is not None


def test_every_code_of_eight_bits_goes_around():
    for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2):
        codes = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), dtype)
        codes = codes[jnp.isfinite(codes.astype(jnp.float32))]
        node = jc.formats.Quantized(codes=codes, scale=jnp.full(1, 0.37), bits=8, axes=(-1,))
        np.testing.assert_array_equal(node.encode(node.materialize()).codes, codes)


def test_shifted_and_squeezed_floats_have_the_moments_of_the_paper():
    """Before rounding ``log2 |y|`` has the mean 0 and the largest value 15; rounded, each is the nearest float."""
    w = weights() * jnp.exp(4 * weights(seed=1))
    w = w.at[5].set(0.0)
    for method, parts in ((Q.S2FP8(), [slice(0, 64)]), (Q.S2FP8(group_size=32), [slice(0, 32), slice(32, 64)])):
        node = fit(method, w)
        for i, part in enumerate(parts):
            for columns in [slice(None)] if len(parts) == 1 else [slice(c, c + 1) for c in range(6)]:
                x = np.asarray(w, np.float64)[part, columns]
                octaves = np.log2(np.abs(x[x != 0]))
                a = 15 / (octaves.max() - octaves.mean())
                b = -a * octaves.mean()
                y = np.sign(x) * 2**b * np.abs(x) ** a
                assert abs(np.log2(np.abs(y[y != 0])).mean()) < 1e-9
                codes = np.asarray(node.codes[part, columns].astype(jnp.float32), np.float64)
                assert codes.max() == 2**15 or codes.min() == -(2**15)
                nearest = np.abs(E5M2[:, None, None] - y).min(0)
                assert (np.abs(codes - y) <= nearest + 1e-4 * np.abs(y)).all()
                value = np.sign(codes) * (2**-b * np.abs(codes)) ** (1 / a)
                np.testing.assert_allclose(node.materialize()[part, columns], value, rtol=1e-4)
                index = (i, columns.start) if len(parts) == 2 else (0, 0)
                np.testing.assert_allclose(node.power.materialize()[index], 1 / a, rtol=1e-5)
        assert node.nbits() == 8 * w.size + 64 * node.scale.size


def test_squeezed_floats_follow_the_range():
    """Finer than plain ones where magnitudes lie close together, no zeros where they do not; the same at any size."""

    def worst(method, w):
        return float(jnp.abs(fit(method, w).materialize() / w - 1).max())

    close, wide = (jnp.exp2(octaves * jnp.sin(100 * weights((256, 4)))) for octaves in (0.3, 24.0))
    power = float(fit(Q.S2FP8(), close).power.materialize()[0, 0])
    assert worst(Q.S2FP8(), close) <= 1.25**power - 1 + 1e-4 < 0.2 * worst(Q.Float8("e5m2", axis=None), close)
    assert worst(Q.S2FP8(), wide) < 0.5
    assert worst(Q.Float8("e5m2", axis=None), wide) == 1
    np.testing.assert_array_equal(fit(Q.S2FP8(), wide).codes, fit(Q.S2FP8(), wide * 2.0**-60).codes)
    # Zero is what lies 17 / 15 times as far below the mean, in octaves, as the largest lies above it.
    lopsided = jnp.exp2(jnp.array([[3.0] * 100, [-3.0] * 100])).at[0, :2].set(jnp.array([2.0**-3.4, 2.0**-3.7]))
    assert (fit(Q.S2FP8(), lopsided).codes.ravel()[:3] == 0).tolist() == [False, True, False]


def test_squeezed_floats_of_equal_magnitudes_and_of_what_is_visible():
    np.testing.assert_allclose(fit(Q.S2FP8(), jnp.array([3.0, -3.0, 0.0])).materialize(), [3, -3, 0], rtol=1e-6)
    w = weights((16, 4)).at[3].mul(1e6)
    shown = jnp.ones_like(w, bool).at[3].set(False)
    few = fit(Q.S2FP8(), w[jnp.arange(16) != 3])
    np.testing.assert_allclose(fit(Q.S2FP8(), w, where=shown).scale, few.scale, rtol=1e-6)
    with pytest.raises(ValueError, match="w: group_size 5 does not divide axis -2 of length 16"):
        jc.plan({"w": w}, [("w", Q.S2FP8(group_size=5))])
    with pytest.raises(ValueError, match="S2FP8: group_size=0 must be positive"):
        Q.S2FP8(group_size=0)


def test_user_tables():
    with pytest.raises(ValueError, match="are not 2 to 256 different numbers"):
        Q.Table((1.0, 1.0))
    with pytest.raises(ValueError, match="are not finite"):
        Q.Table((1.0, math.inf))
    many = np.sort(np.random.default_rng(0).normal(size=200))
    w = weights((50, 2))
    node = fit(Q.Table(tuple(many), axis=None), w)
    value = np.asarray(node.materialize(), np.float64)
    levels = float(node.scale[0, 0]) * many
    np.testing.assert_allclose(value, levels[np.abs(levels - np.asarray(w)[..., None]).argmin(-1)], atol=1e-6)
    assert node.bits == 8


@pytest.mark.parametrize(
    "method",
    [Q.FixedPoint(6, 3), Q.Int(3, symmetric=False), Q.Float8("e5m2"), Q.NF4(group_size=None), Q.NVFP4()],
    ids=repr,
)
def test_stochastic_rounding_is_unbiased_between_two_neighbours(method):
    samples = 2000
    w = weights((16, 2))
    node = method(w)
    keys = jax.random.split(jax.random.key(0), samples)
    draw = jax.jit(jax.vmap(lambda k: Q.Stochastic(method)(w, jc.Context(key=k)).materialize()))
    drawn = np.asarray(draw(keys), np.float64)
    levels = np.unique(np.asarray(node.levels(jnp.float32))) if node.zero is not None else _all_levels(node)
    scale, w = scales(node, w.shape), np.asarray(w, np.float64)
    if node.zero is not None:
        zero = np.asarray(node.zero, np.float64)
        grid = np.arange(8)[:, None, None] - zero
    else:
        grid = np.broadcast_to(levels[:, None, None], (len(levels), *w.shape))
    grid = np.sort(grid * scale, 0)
    inside = (w >= grid[0]) & (w <= grid[-1])
    clipped = np.clip(w, grid[0], grid[-1])
    lower = np.where(grid <= clipped + 1e-6, grid, -np.inf).max(0)
    upper = np.where(grid >= clipped - 1e-6, grid, np.inf).min(0)
    assert (np.minimum(np.abs(drawn - lower), np.abs(drawn - upper)) < 1e-5).all()
    gap = upper - lower
    deviation = np.abs(drawn.mean(0) - clipped)
    assert (deviation <= 5 * gap / 2 / np.sqrt(samples) + 1e-5).all()
    assert (drawn.var(0) <= gap**2 / 4 + 1e-9).all()
    assert inside.mean() > 0.8


def _all_levels(node):
    if node.table is not None:
        return np.asarray(node.table)
    if jnp.issubdtype(node.codes.dtype, jnp.floating):
        return E5M2 if node.bits == 8 else E2M1
    return integers(2 ** (node.bits - 1) - 1)


def test_stochastic_rounding_goes_up_by_the_part_above_the_floor():
    """Trap: the chance counts from the floor; counted from the nearest, 0.7 would go up with 0.3."""
    node = fit(Q.Stochastic(Q.FixedPoint(8, 0)), jnp.full(20_000, 0.7), key=jax.random.key(1))
    assert abs(float(node.materialize().mean()) - 0.7) < 0.015
    with pytest.raises(ValueError, match="needs 'key'"):
        jc.compress({"w": weights()}, jc.plan({"w": weights()}, [("w", Q.Stochastic(Q.Int(4)))]))
    with pytest.raises(ValueError, match="two bits or more"):
        Q.Stochastic(Q.Int(1))(weights(), jc.Context(key=jax.random.key(0)))


def test_small_steps_stall_under_nearest_rounding_and_not_under_stochastic():
    def descend(method):
        def step(w, key):
            return method(w - 0.01, jc.Context(key=key)).materialize(), None

        return jax.lax.scan(step, jnp.ones(400), jax.random.split(jax.random.key(0), 100))[0]

    grid = Q.FixedPoint(6, fraction=3)  # steps of 1/8; half a step is more than 0.01
    assert (descend(grid) == 1).all()
    assert abs(float(descend(Q.Stochastic(grid)).mean())) < 0.06


def test_one_bit_scales_are_optimal_for_each_channel():
    w = weights() * jnp.exp(weights((1, 6), 1))
    node = fit(Q.Int(1), w)
    x = np.asarray(w, np.float64)
    error = np.square(np.asarray(node.materialize()) - x).sum(0)
    signs = np.sign(x)
    best = np.square(x).sum(0) - np.square((signs * x).sum(0)) / len(x)  # least squares on the best signs
    np.testing.assert_allclose(error, best, rtol=1e-5)
    for part in (0.97, 1.03):
        assert (np.square(part * np.asarray(node.scale) * signs - x).sum(0) > error).all()


def brute_ternary(x):
    """The least squared error of any ternary vector: keep the k largest, for every k."""
    a = np.sort(np.abs(np.asarray(x, np.float64)))[::-1]
    return (a**2).sum() - (np.cumsum(a) ** 2 / np.arange(1, a.size + 1)).max()


@pytest.mark.parametrize("draw", ["normal", "laplace", "uniform", "standard_t"])
def test_optimal_ternary_is_the_best_of_all_thresholds(draw):
    rng = np.random.default_rng(0)
    sample = {"standard_t": lambda s: rng.standard_t(3, size=s)}.get(draw, lambda s: getattr(rng, draw)(size=s))
    w = jnp.asarray(sample((300, 8)), jnp.float32)
    found = np.square(np.asarray(fit(Q.Ternary("optimal"), w).materialize() - w, np.float64)).sum(0)
    np.testing.assert_allclose(found, [brute_ternary(x) for x in np.asarray(w).T], rtol=2e-4)


def test_the_ternary_rule_for_normal_weights():
    """Within 1.2% of the optimum, and about 43% zeros: P(|x| < 0.7 sqrt(2/pi)) = 0.423."""
    w = weights((20_000, 1))
    node = fit(Q.Ternary(), w)
    error = float(jnp.square(node.materialize() - w).sum())
    assert error <= 1.012 * brute_ternary(w[:, 0])
    assert abs(float((node.codes == 0).mean()) - math.erf(0.7 * math.sqrt(2 / math.pi) / math.sqrt(2))) < 0.01
    kept = np.abs(np.asarray(w)) > 0.7 * np.abs(np.asarray(w)).mean()
    np.testing.assert_allclose(node.scale[0, 0], np.abs(np.asarray(w))[kept].mean(), rtol=1e-5)


def test_ternary_after_a_mask_counts_what_is_kept():
    w = weights()
    node = fit(jc.chain(jc.prune.Magnitude(sparsity=0.5), Q.Ternary(axis=None)), w)
    kept = np.asarray(w)[np.asarray(node.mask)]
    above = np.abs(kept) > 0.7 * np.abs(kept).mean()
    np.testing.assert_allclose(node.values.scale.ravel(), np.abs(kept)[above].mean(), rtol=1e-5)
    assert not node.materialize()[~node.mask].any()
    with pytest.raises(ValueError, match="threshold='best' is unknown"):
        Q.Ternary("best")


def test_binary_bases_have_least_squares_scales_and_more_never_lose():
    w = weights((200, 3))
    errors = []
    for bases in range(1, 5):
        node = fit(Q.ABCNet(bases), w)
        x = np.asarray(w, np.float64)
        for column in range(3):
            b = np.stack([np.asarray(t.levels(jnp.float32))[:, column] for t in node.terms], 1).astype(np.float64)
            shifts = np.linspace(-1, 1, bases) if bases > 1 else [0.0]
            centred = x[:, column] - x[:, column].mean()
            np.testing.assert_array_equal(
                b, np.stack([np.where(centred + u * centred.std() >= 0, 1, -1) for u in shifts], 1)
            )
            a = np.linalg.lstsq(b, x[:, column], rcond=None)[0]
            np.testing.assert_allclose([float(t.scale[0, column]) for t in node.terms], a, atol=2e-5)
        errors.append(float(jnp.square(node.materialize() - w).sum()))
        assert node.nbits() == bases * (600 + 3 * 32)
    assert errors == sorted(errors, reverse=True)


def test_equal_bases_share_their_scale():
    node = fit(Q.ABCNet(3), jnp.array([1.0, -1.0, 1.0, -1.0]))
    np.testing.assert_allclose(node.materialize(), [1, -1, 1, -1], atol=1e-5)
    assert not fit(Q.ABCNet(3), jnp.zeros(4)).materialize().any()


def test_bases_chosen_one_by_one():
    w = weights((200, 3))
    errors = [float(jnp.square(fit(jc.residual(*[Q.Int(1)] * n), w).materialize() - w).sum()) for n in (2, 3, 4)]
    assert errors == sorted(errors, reverse=True)


def test_outliers_apart_are_counted_and_bounded():
    """A few entries in 16 bits, the bulk in 3: the outliers' error is that of float16, the bulk's half a step."""
    w = jnp.asarray(np.random.default_rng(0).standard_t(3, size=(256, 16)), jnp.float32)
    outliers = jc.chain(jc.prune.Magnitude(sparsity=0.97), Q.Float("float16"))
    node = fit(jc.residual(outliers, Q.Int(3, group_size=64)), w)
    sparse, bulk = node.terms
    kept = np.asarray(sparse.mask)
    assert kept.sum() == round(0.03 * w.size)
    error = np.abs(np.asarray(node.materialize() - w))
    assert (error[kept] <= 2.0**-11 * np.abs(np.asarray(w))[kept]).all()
    assert (error <= scales(bulk, w.shape) / 2 + 2.0**-11 * np.abs(np.asarray(w)) * kept + 1e-6).all()
    index = min(w.size, *(sparse.nbits() - 16 * int(kept.sum()),))
    assert node.nbits() == 16 * int(kept.sum()) + index + 3 * w.size + 32 * 64
    alone = fit(Q.Int(3, group_size=64), w).materialize()
    assert float(jnp.square(node.materialize() - w).sum()) < 0.5 * float(jnp.square(alone - w).sum())


def test_double_quantization_is_within_the_bound_of_both():
    w = weights((256, 8))
    plain, double = fit(Q.Int(4, group_size=64), w), fit(jc.chain(Q.Int(4, group_size=64), Q.Int(8)), w)
    first, second = np.asarray(plain.scale), np.asarray(double.scale.materialize())
    assert (np.abs(first - second) <= first.max(0) / 127 / 2 + 1e-8).all()
    bound = scales(plain, w.shape) / 2 + 7 * np.repeat(np.abs(first - second), 64, 0)
    assert (np.abs(np.asarray(double.materialize() - w)) <= bound + 1e-6).all()
    assert double.nbits() == 4 * w.size + 8 * 32 + 32 * 8


@pytest.mark.parametrize("method", [jc.quantize.Float8, jc.quantize.Int])
def test_a_pair_for_a_group_is_told_to_be_a_block(method):
    with pytest.raises(ValueError, match=r"group_size=\(128, 128\).*block=\(128, 128\)"):
        method(group_size=(128, 128))
