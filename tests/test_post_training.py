"""Methods that round with the inputs of a layer in mind, against closed forms, brute force and planted outliers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from jcompress.formats import rotated
from jcompress.quantize import AWQ, GPFQ, GPTQ, INQ, LAB, LQER, AdaRound, Int, PowersOfTwo, Rotation
from jcompress.rewrite import smooth


def correlated(rng, k, n=None):
    """Inputs whose features are mixed."""
    mix = rng.normal(size=(k, k)) / k**0.5 + 0.5 * np.eye(k)
    return (rng.normal(size=(n or 4 * k, k)) @ mix).astype(np.float32)


def context(x, **known):
    gram = jnp.asarray(x.T.astype(np.float64) @ x, jnp.float32)
    return jc.Context(stats=jc.trace.Stats(gram=gram, axes=(-2,)), **known)


def weights(rng, shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def moved(node, w, x):
    """How far the outputs moved, in squares: tr(dW^T X^T X dW)."""
    dense = node.materialize() if hasattr(node, "materialize") else node
    return float(((x.astype(np.float64) @ (np.asarray(dense, np.float64) - np.asarray(w))) ** 2).sum())


# Rotations


@pytest.mark.parametrize("n", [1, 2, 16, 12, 48, 40, 384])
def test_the_fast_transform_is_a_hadamard_matrix(n):
    matrix = np.asarray(rotated.hadamard(jnp.eye(n))) * n**0.5
    np.testing.assert_allclose(np.abs(matrix), 1, atol=1e-4)
    np.testing.assert_allclose(matrix @ matrix.T, n * np.eye(n), atol=1e-2)
    np.testing.assert_allclose(rotated.hadamard(jnp.eye(n), transpose=True) * n**0.5, matrix.T, atol=1e-4)


def test_orders_without_a_known_matrix_are_rotated_in_blocks():
    assert [rotated.hadamard_order(n) for n in (8, 384, 1536, 80, 28, 3, 6)] == [1, 12, 12, 20, 0, 0, 0]
    matrix = np.asarray(rotated.hadamard(jnp.eye(28)))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(28), atol=1e-5)
    np.testing.assert_array_equal(np.abs(matrix) > 1e-6, np.kron(np.eye(7), np.ones((4, 4))) > 0)


def test_a_rotation_hides_outliers_and_goes_with_gptq(rng):
    x, w = correlated(rng, 24, 200), weights(rng, (24, 16)).at[5].mul(20.0)
    errors = [moved(m(w, context(x)), w, x) for m in (GPTQ(4), Rotation(Int(4)), Rotation(GPTQ(4)))]
    assert errors[2] < errors[1]
    assert errors[2] < 0.5 * moved(Int(4)(w), w, x)
    node = Rotation(Int(4))(w)
    apart = jnp.linalg.norm(node.rotate(w) - node.values.materialize())
    np.testing.assert_allclose(jnp.linalg.norm(node.materialize() - w), apart, rtol=1e-4)
    assert node.nbits() <= Int(4)(w).nbits() + 24


def test_a_convolution_is_rotated_in_each_place_of_its_window(rng):
    def fn(params, x):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, params["w"], (1, 1), "VALID", dimension_numbers=dims)

    params = {"w": weights(rng, (2, 2, 4, 6)).at[..., 1, :].mul(10.0)}
    x = jnp.asarray(correlated(rng, 4, 8 * 25).reshape(8, 5, 5, 4))
    stats = jc.calibrate(fn, params, [x], statistics=["gram"])
    errors = {}
    for name, method in {"gptq": Rotation(GPTQ(3)), "int": Rotation(Int(3))}.items():
        small = jc.materialize(jc.compress(params, jc.plan(params, [("w", method)]), stats=stats))
        errors[name] = float(((fn(small, x) - fn(params, x)) ** 2).sum())
    assert errors["gptq"] < 0.9 * errors["int"]


# Scales of inputs


def test_awq_is_never_worse_than_its_grid_and_finds_planted_channels(rng):
    for grid in (Int(3), GPTQ(3)):
        x, w = correlated(rng, 32), weights(rng, (32, 16))
        x[:, :3] *= 30
        node, plain = AWQ(grid)(w, context(x)), grid(w, context(x))
        assert moved(node, w, x) < 0.8 * moved(plain, w, x)
        scale = np.asarray(1 / node.scale.materialize().astype(jnp.float32))[:, 0]
        assert scale[:3].min() > scale[3:].max()
        assert node.nbits() == plain.nbits() + 16 * 32
    even = np.linalg.qr(rng.normal(size=(64, 32)))[0].astype(np.float32)
    np.testing.assert_allclose(AWQ(Int(3))(w, context(even)).materialize(), Int(3)(w).materialize(), atol=1e-5)


def test_smoothing_keeps_the_function_and_evens_out_ranges(rng):
    def fn(params, x):
        mean, deviation = x.mean(-1, keepdims=True), x.std(-1, keepdims=True)
        h = (x - mean) / deviation * params["norm"]["scale"] + params["norm"]["bias"]
        return h @ params["query"], jnp.einsum("bi,ihd->bhd", h, params["key"])

    params = {
        "norm": {"scale": weights(rng, 16).at[2].set(40.0), "bias": weights(rng, 16)},
        "query": weights(rng, (16, 8)),
        "key": weights(rng, (16, 2, 4)),
    }
    x = weights(rng, (64, 16))
    stats = jc.calibrate(fn, params, [x], statistics=["absmax"])
    new = smooth(params, jc.trace.Groups.between(params, {("norm/scale", "norm/bias"): ["query", ("key", 0)]}), stats)
    for a, b in zip(fn(params, x), fn(new, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    after = jc.calibrate(fn, new, [x], statistics=["absmax"])["query"].absmax
    rows = jnp.maximum(jnp.abs(new["query"]).max(1), jnp.abs(new["key"]).max((1, 2)))
    np.testing.assert_allclose(after, rows, rtol=1e-4)  # at one half both ranges are the geometric mean
    with pytest.raises(ValueError, match="norm/offset: the group 'norm' names it"):
        smooth(params, {"norm": jc.trace.Group(8, (("norm/offset", 0),), (("query", 0),))}, stats)


# Rounding


def test_adaround_is_near_the_best_of_all_roundings_and_never_above_nearest(rng):
    x, w = correlated(rng, 8, 60), weights(rng, (8, 16))
    node = AdaRound(3, clip="minmax", steps=500)(w, context(x))
    plain = Int(3)(w)
    np.testing.assert_array_equal(node.scale, plain.scale)
    scale, hessian = np.asarray(plain.scale, np.float64)[0], x.T.astype(np.float64) @ x
    choices = np.array(list(itertools.product((0, 1), repeat=8)))
    ratios = []
    for j in range(16):
        column = np.asarray(w, np.float64)[:, j]
        levels = np.clip(np.floor(column / scale[j]) + choices, -3, 3)
        off = scale[j] * levels - column
        best = np.einsum("ci,ij,cj->c", off, hessian, off).min()
        found, rounded = (np.asarray(n.materialize(), np.float64)[:, j] - column for n in (node, plain))
        assert found @ hessian @ found <= rounded @ hessian @ rounded * (1 + 1e-5)
        assert (np.abs(found) < scale[j] * (1 + 1e-5)).all()
        ratios.append((found @ hessian @ found / best, rounded @ hessian @ rounded / best))
    means = np.mean(ratios, axis=0)
    assert 1 - 1e-5 <= means[0] < 1.5
    assert means[0] < 0.5 * (1 + means[1])


def test_greedy_path_following_is_its_definition(rng):
    x, w = correlated(rng, 20, 30), weights(rng, (20, 5))
    node = GPFQ(3)(w, context(x))
    scale, values, u = np.asarray(node.scale, np.float64), np.zeros((20, 5)), np.zeros((30, 5))
    for t in range(20):
        u += np.outer(x[:, t], np.asarray(w, np.float64)[t])
        z = x[:, t].astype(np.float64) @ u / (x[:, t].astype(np.float64) @ x[:, t])
        values[t] = scale[0] * np.clip(np.round(z / scale[0]), -3, 3)
        u -= np.outer(x[:, t], values[t])
    np.testing.assert_allclose(node.materialize(), values, atol=1e-4)


def test_the_error_of_path_following_falls_as_one_over_the_inputs():
    """Ternary, 32 samples of white noise, as in the paper: relative squared errors on a line of slope near -1."""
    errors, sizes = {2: [], "nearest": []}, [64, 256, 1024]
    for k in sizes:
        rng = np.random.default_rng(k)
        x, w = rng.normal(size=(32, k)).astype(np.float32), jnp.asarray(rng.uniform(-1, 1, size=(k, 8)), jnp.float32)
        size = float(((x @ np.asarray(w)) ** 2).sum())
        errors[2].append(moved(GPFQ(2)(w, context(x)), w, x) / size)
        errors["nearest"].append(moved(Int(2)(w), w, x) / size)
    slope = np.polyfit(np.log(sizes), np.log(errors[2]), 1)[0]
    assert slope < -0.7
    assert all(a < b for a, b in zip(errors[2], errors["nearest"], strict=True))


def test_stochastic_path_following_is_unbiased_where_inputs_do_not_meet():
    w = jnp.full((8, 4000), 0.3).at[0].set(1.0)
    stats = jc.trace.Stats(gram=jnp.eye(8), axes=(-2,))

    def draw(seed):
        return GPFQ(3, axis=None, stochastic=True)(w, jc.Context(stats=stats, key=jax.random.key(seed)))

    node = draw(0)
    levels = float(node.scale[0, 0]) * np.array([0, 1])
    assert set(np.unique(np.round(node.materialize()[1:], 5))) == set(np.round(levels.astype(np.float32), 5))
    np.testing.assert_allclose(node.materialize()[1:].mean(), 0.3, atol=0.004)  # 5 standard errors
    np.testing.assert_array_equal(node.codes, draw(0).codes)
    assert bool((node.codes != draw(1).codes).any())


# Corrections, parts, curvature


def test_low_rank_corrections_reach_the_optimum(rng):
    x, w = correlated(rng, 16, 100), weights(rng, (16, 12))
    left = np.asarray(w - Int(3)(w).materialize(), np.float64)
    values, vectors = np.linalg.eigh(x.T.astype(np.float64) @ x)
    tail = np.linalg.svd((vectors * np.sqrt(values)) @ vectors.T @ left)[1][4:]
    node = LQER(4, Int(3), damping=0.0)(w, context(x))
    np.testing.assert_allclose(moved(node, w, x), (tail**2).sum(), rtol=1e-3)
    by_norms = moved(LQER(4, Int(3), by="diagonal")(w, context(x)), w, x)
    assert moved(node, w, x) < by_norms < moved(Int(3)(w), w, x)
    even = (4 * np.linalg.qr(rng.normal(size=(64, 16)))[0]).astype(np.float32)
    for by in ("gram", "diagonal"):
        np.testing.assert_allclose(
            moved(LQER(4, Int(3), by=by, damping=0.0)(w, context(even)), w, even),
            16 * (np.linalg.svd(left)[1][4:] ** 2).sum(),
            rtol=1e-3,
        )
    assert node.nbits() == Int(3)(w).nbits() + 32 * 4 * (16 + 12)
    both = LQER(4, GPTQ(3))(w, context(x))
    assert moved(both, w, x) < moved(GPTQ(3)(w, context(x)), w, x)


@pytest.mark.parametrize("group_size", [None, 4])
def test_clips_are_those_of_least_output_error(group_size, rng):
    """Even inputs leave the scales at one; each range is then cut as brute force over its own inputs would."""
    w = weights(rng, (16, 5)) * jnp.exp(weights(rng, (16, 5)))
    x = rng.normal(size=(64, 16)) * 1.0
    x = x / np.sqrt((x**2).sum(0))
    grid, parts, gram = Int(3, group_size=group_size), np.linspace(1, 0.5, 6), x.T @ x
    found = AWQ(grid, points=2, clips=6)(w, context(x)).materialize()
    size, want = group_size or 16, np.zeros((16, 5))
    for rows in (slice(i, i + size) for i in range(0, 16, size)):
        for j in range(5):
            column = np.asarray(w, np.float64)[rows, j]
            tried = []
            for part in parts:
                top = part * np.abs(column).max()
                tried.append(np.clip(np.round(column / (top / 3)), -3, 3) * top / 3)
            errors = [(q - column) @ gram[rows, rows] @ (q - column) for q in tried]
            want[rows, j] = tried[int(np.argmin(errors))]
    assert moved(want, w, x) < moved(grid(w), w, x)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs a grid that gives Quantized"):
        AWQ(jc.residual(Int(2), Int(2)), clips=2)(w, context(x))


def test_frozen_parts_stay_bit_for_bit_while_the_rest_moves(rng):
    w, previous, frozen = weights(rng, (16, 8)), None, np.zeros((16, 8), bool)
    for part in (0.5, 0.75, 0.875, 1.0):
        method = INQ(free=jc.prune.Magnitude(sparsity=part))
        node = method(w, jc.Context(previous=previous))
        mask = np.asarray(node.terms[0].mask)
        assert mask.sum() == round(part * 128)
        assert (mask >= frozen).all()
        dense = np.asarray(node.materialize())
        if previous is not None:
            np.testing.assert_array_equal(dense[frozen], np.asarray(previous.materialize())[frozen])
        np.testing.assert_array_equal(dense[~mask], np.asarray(w)[~mask])
        new = mask & ~frozen
        assert new.sum() == 0 or np.abs(np.asarray(w))[new].min() >= np.abs(np.asarray(w))[~mask].max(initial=0)
        previous, frozen = node, mask
        w = node.materialize() + jnp.where(mask, 0, 0.1) * weights(rng, (16, 8))
    levels = np.abs(np.asarray(node.materialize()))
    exponents = np.log2(levels[levels > 0])
    np.testing.assert_array_equal(exponents, np.round(exponents))
    plain = PowersOfTwo(bits=5)(w)
    assert node.nbits() <= plain.nbits() + 2 * 128


def test_the_optimizer_transform_freezes_more_and_more(rng):
    import optax

    params = {"w": weights(rng, (16, 8))}
    parts = optax.piecewise_constant_schedule(0.5, {2: 2.0})
    tx = optax.chain(optax.sgd(0.1), jc.project(jc.plan(params, [("w", INQ(jc.prune.Magnitude(parts)))]), every=1))
    state, seen = tx.init(params), []
    for _ in range(4):
        updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
        params = optax.apply_updates(params, updates)
        levels = np.log2(np.maximum(np.abs(np.asarray(params["w"])), 1e-30))
        seen.append((np.asarray(params["w"]), levels == np.round(levels)))
    first = seen[0][1]
    assert 64 <= first.sum() < 80
    for values, _ in seen[1:]:
        np.testing.assert_array_equal(values[first], seen[0][0][first])
    assert (seen[-1][1] | (seen[-1][0] == 0)).all()


def test_loss_aware_scales_minimize_the_weighted_error(rng):
    w, squares = weights(rng, (32, 4)), jnp.asarray(rng.uniform(0.1, 9, size=(32, 4)), jnp.float32)
    node = LAB()(w, jc.Context(stats=jc.trace.Stats(grad_square=squares)))
    d, dense = np.sqrt(np.asarray(squares, np.float64)), np.asarray(w, np.float64)
    for j in range(4):
        scales = np.linspace(0.2, 2.0, 20001)
        errors = (d[:, j, None] * (dense[:, j, None] - scales * np.sign(dense[:, j, None])) ** 2).sum(0)
        np.testing.assert_allclose(node.scale[0, j], scales[errors.argmin()], atol=2e-4)
    even = LAB()(w, jc.Context(stats=jc.trace.Stats(grad_square=jnp.full_like(w, 3.0))))
    np.testing.assert_allclose(even.materialize(), Int(1)(w).materialize(), rtol=1e-5)


def test_errors_name_what_is_wrong(rng):
    w = jnp.ones((6, 4))
    with pytest.raises(ValueError, match="points=1 must be at least 2"):
        AWQ(points=1)
    with pytest.raises(ValueError, match="b: Rotation needs axis -2"):
        jc.plan({"b": jnp.ones(4)}, [("b", Rotation())])
    with pytest.raises(ValueError, match="one symmetric bit has no level above or below"):
        AdaRound(1)
    with pytest.raises(ValueError, match="bits=1 leaves no level near 0"):
        GPFQ(1)
    with pytest.raises(ValueError, match="rank=0 must be positive"):
        LQER(0)
    with pytest.raises(ValueError, match="by='svd' is unknown"):
        LQER(1, by="svd")
    with pytest.raises(ValueError, match=r"array: the grid Int.* expected Quantized with scales that are held"):
        INQ(jc.prune.Magnitude(0.5), Int(4))(w)
    for method in (AWQ(), AdaRound(), GPFQ(), LQER(1)):
        with pytest.raises(ValueError, match=r"w: \w+ needs 'stats.gram', which is missing"):
            jc.compress({"w": jnp.ones((128, 4))}, jc.plan({"w": jnp.ones((128, 4))}, [("w", method)]))
