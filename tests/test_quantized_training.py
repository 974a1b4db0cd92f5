"""Training through quantizers: gradients against their formulas, region by region, and what training reaches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import jcompress as jc
from jcompress.formats import fake_quantized
from jcompress.numeric import surrogates
from jcompress.quantize import training
from jcompress.quantize.training import dorefa

KEY = jax.random.key(5)


def normal(rng, *shape, scale=1.0):
    return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)


def gradients_of(node, cotangent):
    """The gradients of ``sum(cotangent * dense)`` in the trainable leaves of a node."""
    train, held = jc.split(node)
    return jax.jit(jax.grad(lambda t: (cotangent * jc.merge(t, held).materialize()).sum()))(train)


# Learned steps.


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gradients_of_weights_and_steps_are_those_of_the_paper(bits, rng):
    w, g = normal(rng, 40, 3), normal(rng, 40, 3)
    n, p = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    scale = np.float32([[1.1 / p, 2.0 / p, 0.4 / p]])
    node = jc.formats.FakeQuantized(w, jnp.asarray(scale), bits=bits)
    u = np.asarray(w) / scale
    rounded = np.round(np.clip(u, -n, p))
    np.testing.assert_allclose(node.materialize(), scale * rounded, rtol=1e-6)
    found = gradients_of(node, g)
    inside = (u > -n) & (u < p)
    assert inside.any() and not inside.all()
    np.testing.assert_allclose(found.values, np.where(inside, g, 0), rtol=1e-6)
    slope = np.where(inside, rounded - u, np.clip(u, -n, p))
    want = (np.asarray(g) * slope).sum(0, keepdims=True) / np.sqrt(40 * p)
    np.testing.assert_allclose(found.scale, want, rtol=1e-4, atol=1e-5)


def test_the_first_step_is_that_of_the_papers(rng):
    w = normal(rng, 64, 5)
    x = np.asarray(w, np.float64)
    node = jax.jit(training.LSQ(bits=3, axis=None))(w)
    np.testing.assert_allclose(node.scale, [[2 * np.abs(x).mean() / np.sqrt(3)]], rtol=1e-5)
    node = jax.jit(training.LSQ(bits=3, start="deviation"))(w)
    ends = np.abs([x.mean(0) - 3 * x.std(0), x.mean(0) + 3 * x.std(0)]).max(0)
    np.testing.assert_allclose(node.scale, ends[None] / 4, rtol=1e-4)
    node = jax.jit(training.LSQ(bits=3, start="range"))(w)
    assert float(jnp.abs(node.materialize() - w).max()) <= float(node.scale.max()) / 2 + 1e-6
    masked = jax.jit(jc.chain(jc.prune.Magnitude(sparsity=0.5), training.LSQ(bits=3, axis=None)))(w)
    kept = np.abs(x)[np.asarray(masked.mask)]
    np.testing.assert_allclose(masked.values.scale, [[2 * kept.mean() / np.sqrt(3)]], rtol=1e-5)


def test_groups_have_steps_of_their_own(rng):
    w, g = normal(rng, 8, 3), normal(rng, 8, 3)
    together = jax.jit(training.LSQ(bits=3, group_size=4))(w)
    found = gradients_of(together, g)
    for i in (0, 1):
        part = slice(4 * i, 4 * i + 4)
        alone = jax.jit(training.LSQ(bits=3))(w[part])
        want = gradients_of(alone, g[part])
        np.testing.assert_allclose(together.materialize()[part], alone.materialize(), rtol=1e-6)
        np.testing.assert_allclose(found.scale[i], want.scale[0], rtol=1e-4)
        np.testing.assert_allclose(found.values[part], want.values, rtol=1e-6)


@pytest.mark.parametrize("method", [training.LSQ(bits=3), training.DSQ(bits=2), training.DoReFa(bits=2)])
def test_what_is_stored_is_what_was_trained(method, rng):
    params = {"w": normal(rng, 16, 6)}
    node = jc.compress(params, jc.plan(params, [("w", method)]))["w"]
    moved = dataclasses.replace(node, values=node.values + 0.3 * normal(rng, 16, 6), scale=0.8 * node.scale)
    stored = jc.finalize(moved)
    assert isinstance(stored, jc.formats.Quantized)
    np.testing.assert_array_equal(stored.materialize(), moved.materialize())
    assert stored.nbits() == 16 * 6 * method.bits + 32 * stored.scale.size


def test_activations_have_the_gradients_of_the_papers(rng):
    x, g, scale = 2 * normal(rng, 200), normal(rng, 200), jnp.asarray(0.37)
    for signed, n, p in ((False, 0, 7), (True, 4, 3)):
        _, pull = jax.vjp(lambda x, s, signed=signed: training.lsq(x, s, 3, signed), x, scale)
        u = np.asarray(x) / 0.37
        inside = (u > -n) & (u < p)
        to_x, to_scale = pull(g)
        np.testing.assert_allclose(to_x, np.where(inside, g, 0), rtol=1e-6)
        slope = np.where(inside, np.round(u) - u, np.clip(u, -n, p))
        np.testing.assert_allclose(to_scale, (g * slope).sum() / np.sqrt(200 * p), rtol=1e-3, atol=1e-4)
    offset = jnp.asarray(-0.5)
    value, pull = jax.vjp(lambda *a: training.lsq_plus(*a, bits=3), x, scale, offset)
    u = (np.asarray(x) + 0.5) / 0.37
    np.testing.assert_allclose(value, np.round(np.clip(u, 0, 7)) * 0.37 - 0.5, rtol=1e-5)
    outside = (u <= 0) | (u >= 7)
    np.testing.assert_allclose(pull(g)[2], np.where(outside, g, 0).sum() / np.sqrt(200 * 7), rtol=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_pact_clips_and_its_bound_learns_from_what_it_clips(bits, rng):
    x, g = 2 * normal(rng, 300), normal(rng, 300)
    alpha = 1.3
    value, pull = jax.vjp(lambda x, a: training.pact(x, a, bits), x, jnp.asarray(alpha))
    clipped = 0.5 * (np.abs(x) - np.abs(x - alpha) + alpha)
    step = alpha / (2**bits - 1)
    np.testing.assert_allclose(value, np.round(clipped / step) * step, atol=1e-6)
    assert float(jnp.abs(value - clipped).max()) <= step / 2 + 1e-6
    to_x, to_alpha = pull(g)
    np.testing.assert_array_equal(to_x, np.where((x > 0) & (x < alpha), g, 0))
    np.testing.assert_allclose(to_alpha, np.where(x >= alpha, g, 0).sum(), rtol=1e-4)


# Soft rounding.


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.7])
def test_soft_rounding_meets_the_levels_and_its_derivative_is_the_difference_quotient(alpha, rng):
    k = np.log(2 / alpha - 1)
    np.testing.assert_allclose(1 / np.tanh(k / 2), 1 / (1 - alpha), rtol=1e-6)
    x = np.linspace(-2, 2, 401)[::4] + 0.003
    soft = surrogates.soft_round(jnp.asarray(x, jnp.float32), jnp.asarray(k, jnp.float32))
    assert np.abs(soft - x).max() <= 0.5
    ends = surrogates.soft_round(jnp.asarray([0.0, 1 - 1e-6]), jnp.asarray(k, jnp.float32))
    np.testing.assert_allclose(ends, [0, 1], atol=1e-4)

    def value(x, k):
        t = x - np.floor(x) - 0.5
        return np.floor(x) + (np.tanh(k * t) / np.tanh(k / 2) + 1) / 2

    node = jc.formats.FakeQuantized(
        jnp.asarray(x[:, None], jnp.float32), jnp.ones((1, 1)), jnp.full((1, 1), alpha), bits=4, surrogate="soft"
    )
    np.testing.assert_array_equal(node.materialize()[:, 0], np.round(x))
    g = normal(rng, x.size, 1)
    found = gradients_of(node, g)
    slope = (value(x + 1e-5, k) - value(x - 1e-5, k)) / 2e-5
    np.testing.assert_allclose(found.values[:, 0], g[:, 0] * slope, rtol=2e-3, atol=1e-4)
    by_alpha = (value(x, np.log(2 / (alpha + 1e-5) - 1)) - value(x, np.log(2 / (alpha - 1e-5) - 1))) / 2e-5
    np.testing.assert_allclose(found.softness.sum(), (g[:, 0] * by_alpha).sum(), rtol=1e-2, atol=1e-3)


def test_as_the_softness_falls_soft_rounding_becomes_hard_and_at_one_straight_through(rng):
    x = normal(rng, 500, scale=2.0)
    x = x[jnp.abs(x - jnp.floor(x) - 0.5) > 0.05]
    hard = surrogates.soft_round(x, jnp.log(2 / 1e-6 - 1) * 8)
    np.testing.assert_allclose(hard, jnp.round(x), atol=1e-3)
    w, g = normal(rng, 50, 2), normal(rng, 50, 2)
    plain = training.LSQ(bits=3)(w)
    soft = dataclasses.replace(training.DSQ(bits=3)(w), scale=plain.scale, softness=jnp.full((1, 2), 0.9999))
    found, want = gradients_of(soft, g), gradients_of(plain, g)
    np.testing.assert_allclose(found.values, want.values, atol=1e-4)
    np.testing.assert_allclose(found.scale, want.scale, atol=1e-3)


def test_soft_assignments_tend_to_the_nearest_center_and_their_entropy_to_the_histogram(rng):
    z, centers = normal(rng, 60, 2), normal(rng, 5, 2)
    near = np.square(np.asarray(z)[:, None] - np.asarray(centers)).sum(-1).argmin(1)
    soft, p = training.soft_assign(z, centers, 1e5)
    np.testing.assert_allclose(soft, np.asarray(centers)[near], atol=1e-3)
    counts = np.bincount(near, minlength=5)
    np.testing.assert_allclose(training.assignment_entropy(p), stats.entropy(counts, base=2), rtol=1e-3)
    hardness = 2.0
    e = np.exp(-hardness * np.square(np.asarray(z)[:, None] - np.asarray(centers)).sum(-1))
    want = (e / e.sum(1, keepdims=True)) @ np.asarray(centers)
    np.testing.assert_allclose(training.soft_assign(z, centers, hardness)[0], want, rtol=1e-4, atol=1e-5)


def test_tempered_noise_is_in_proportion_to_the_error_and_fades(rng):
    params = {"w": normal(rng, 20)}
    plan = jc.plan(params, [("w", jc.quantize.Int(bits=3))])
    quantized = jc.simulate(params, plan)
    keys = jax.random.split(KEY, 4000)
    drawn = jax.vmap(lambda k: training.temper(params, quantized, 0.5, k)["w"])(keys)
    np.testing.assert_allclose(drawn.std(0), 0.5 * jnp.abs(params["w"] - quantized["w"]), rtol=0.1, atol=1e-6)
    np.testing.assert_allclose(drawn.mean(0), quantized["w"], atol=0.01)
    cold = training.temper(params, quantized, 0.0, KEY)["w"]
    np.testing.assert_array_equal(cold, quantized["w"])

    def loss(p):
        return training.temper(p, jc.simulate(p, plan), 0.5, KEY)["w"].sum()

    np.testing.assert_array_equal(jax.grad(loss)(params)["w"], np.ones(20))


# DoReFa.


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_dorefa_weights_and_activations_are_the_formula(bits, rng):
    w = normal(rng, 12, 4)
    t, n = np.tanh(np.asarray(w, np.float64)), 2**bits - 1
    want = 2 * np.round(n * (t / (2 * np.abs(t).max()) + 0.5)) / n - 1
    want = np.sign(w) * np.abs(w).mean() if bits == 1 else want
    np.testing.assert_allclose(dorefa.weight(w, bits), want, atol=1e-6)
    assert len(np.unique(np.round(dorefa.weight(w, bits), 5))) <= 2**bits
    squash = (lambda w: w) if bits == 1 else (lambda w: jnp.tanh(w) / jnp.abs(jnp.tanh(w)).max())
    smooth = jax.jit(jax.grad(lambda w: squash(w)[0, 0]))(w)
    found = jax.jit(jax.grad(lambda w: dorefa.weight(w, bits)[0, 0]))(w)
    np.testing.assert_allclose(found, smooth, rtol=1e-4, atol=1e-6)
    x = 2 * normal(rng, 100)
    np.testing.assert_allclose(dorefa.activation(x, bits), np.round(n * np.clip(x, 0, 1)) / n, atol=1e-6)
    slope = jax.grad(lambda x: dorefa.activation(x, bits).sum())(x)
    np.testing.assert_array_equal(slope, ((x > 0) & (x < 1)).astype(jnp.float32))


def test_the_node_with_a_scale_of_one_step_is_the_paper_s_weight(rng):
    node = training.DoReFa(bits=3)(normal(rng, 12, 4))
    paper = dataclasses.replace(node, scale=jnp.full((1, 1), 1 / 7))
    np.testing.assert_allclose(paper.materialize(), dorefa.weight(node.values, 3), atol=1e-6)
    again = training.DoReFa(bits=3)(node.materialize())
    np.testing.assert_allclose(again.materialize(), node.materialize(), atol=1e-6)


def test_quantized_gradients_are_unbiased_and_on_the_grid_of_each_example(rng):
    g = normal(rng, 2, 6) * jnp.array([[1.0], [100.0]])

    def drawn(key):
        return jax.grad(lambda x: (dorefa.gradient(x, 2, key) * g).sum())(jnp.zeros((2, 6)))

    many = jax.jit(jax.vmap(drawn))(jax.random.split(KEY, 8000))
    most = np.abs(g).max(1, keepdims=True)
    levels = np.unique(np.round(np.asarray(many) / most, 4))
    np.testing.assert_allclose(levels, [-1, -1 / 3, 1 / 3, 1], atol=1e-3)
    np.testing.assert_allclose(many.mean(0) / most, g / most, atol=0.03)
    np.testing.assert_array_equal(dorefa.gradient(g, 2, KEY), g)


def test_gradients_of_few_bits_are_unbiased_and_differ_from_step_to_step(rng):
    grads = {"w": normal(rng, 30), "b": normal(rng, 4)}
    tx = jc.quantize.round_gradients(3, KEY)

    @jax.jit
    def step(state, _):
        updates, state = tx.update(grads, state)
        return state, updates

    _, found = jax.lax.scan(step, tx.init(grads), None, 6000)
    for name, g in grads.items():
        most = float(jnp.abs(g).max())
        np.testing.assert_allclose(found[name].mean(0), g, atol=0.03 * most)
        steps = (np.asarray(found[name]) / most + 1) * 3.5
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    assert bool((found["w"][0] != found["w"][1]).any())


# One bit and three values.


def test_signs_train_through_the_weights_behind_them(rng):
    w, g = normal(rng, 30, 4), normal(rng, 30, 4)
    node = training.BinaryConnect(learned=True)(w)
    scale = np.abs(np.asarray(w)).mean(0, keepdims=True)
    np.testing.assert_allclose(node.materialize(), np.sign(w) * scale, rtol=1e-5)
    found = gradients_of(node, g)
    np.testing.assert_allclose(found.values, g * scale, rtol=1e-5)
    np.testing.assert_allclose(found.scale, (np.asarray(g) * np.sign(w)).sum(0, keepdims=True), rtol=1e-4, atol=1e-5)
    still = training.BinaryConnect()(w)
    assert len(jax.tree.leaves(jc.split(still)[0])) == 1
    np.testing.assert_array_equal(jc.finalize(still).materialize(), still.materialize())
    assert jc.finalize(still).nbits() == 120 + 32 * 4


def test_values_accumulate_under_signs_that_stay_until_they_turn():
    params = {"w": training.BinaryConnect(axis=None)(jnp.array([1.0, -1.0]))}
    train, held = jc.split(params)
    tx = optax.chain(optax.sgd(0.3), training.clip_values())
    state, seen = tx.init(train), []
    for _ in range(5):
        grads = jax.grad(lambda t: jc.materialize(jc.merge(t, held))["w"].sum())(train)
        updates, state = tx.update(grads, state, train)
        train = optax.apply_updates(train, updates)
        seen.append((train["w"].values.tolist(), jc.materialize(jc.merge(train, held))["w"].tolist()))
    np.testing.assert_allclose([values for values, _ in seen], [[1 - 0.3 * i, -1] for i in range(1, 6)], atol=1e-6)
    assert [signs[0] for _, signs in seen] == [1, 1, 1, -1, -1]


def test_drawn_signs_have_the_probability_of_the_hard_sigmoid():
    values = np.array([-1.5, -0.6, 0.0, 0.2, 2.0])
    node = jc.formats.Binarized(jnp.asarray(values, jnp.float32), jnp.full(1, 0.5), stochastic=True, axes=(-1,))
    drawn = jax.vmap(lambda k: node.materialize(key=k))(jax.random.split(KEY, 20_000))
    np.testing.assert_allclose((drawn > 0).mean(0), np.clip((values + 1) / 2, 0, 1), atol=0.012)
    assert node.materialize().tolist() == [-0.5, -0.5, 0.5, 0.5, 0.5]


def test_scaled_signs_are_the_nearest_and_binary_products_are_bit_counts(rng):
    x = normal(rng, 3, 20)
    found = np.asarray(training.scaled_sign(x))
    for a in np.linspace(0.1, 2, 60):
        assert (np.square(found - x).sum(1) <= np.square(a * np.sign(x) - x).sum(1) + 1e-5).all()
    a, b = (np.asarray(training.sign_ste(normal(rng, 64))) for _ in range(2))
    differing = np.bitwise_count(np.packbits(a > 0) ^ np.packbits(b > 0)).sum()
    assert a @ b == 64 - 2 * differing


def test_the_concave_penalty_drives_weights_to_plus_and_minus_one(rng):
    target = jnp.asarray(rng.uniform(-0.9, 0.9, 50), jnp.float32)

    @jax.jit
    def run(w):
        def step(w, i):
            def loss(w):
                return jnp.square(w - target).sum() + 0.02 * i * training.concave_penalty(w)

            return jnp.clip(w - 0.02 * jax.grad(loss)(w), -1, 1), None

        return jax.lax.scan(step, w, jnp.arange(400))[0]

    found = run(target)
    np.testing.assert_array_equal(found, jnp.sign(target))
    assert float(training.concave_penalty(found)) == 0


def test_both_levels_learn_from_their_own_weights(rng):
    w, g = normal(rng, 30, 4), normal(rng, 30, 4)
    node = training.TTQ(threshold=0.2)(w)
    cut = 0.2 * np.abs(w).max()
    p, n = np.asarray(w) > cut, np.asarray(w) < -cut
    a, b = np.asarray(w)[p].mean(), -np.asarray(w)[n].mean()
    np.testing.assert_allclose(node.materialize(), a * p - b * n, rtol=1e-5)
    found = gradients_of(node, g)
    np.testing.assert_allclose(found.positive, [[np.asarray(g)[p].sum()]], rtol=1e-4)
    np.testing.assert_allclose(found.negative, [[-np.asarray(g)[n].sum()]], rtol=1e-4)
    np.testing.assert_allclose(found.values, g * np.where(p, a, np.where(n, b, 1)), rtol=1e-5)
    stored = jc.finalize(node)
    np.testing.assert_array_equal(stored.materialize(), node.materialize())
    assert stored.nbits() == 2 * 120 + 32 * 3


# Noise and relaxation.


def test_quant_noise_is_training_through_rounding_at_rate_one_and_dense_at_zero(rng):
    params = {"w": normal(rng, 64, 10)}
    inner = jc.quantize.Int(bits=2)
    exact = jax.jit(lambda p: jc.simulate(p, jc.plan(p, [("w", inner)]))["w"])(params)

    def value(rate, key=KEY, block_size=1):
        plan = jc.plan(params, [("w", training.QuantNoise(inner, rate, block_size))])
        return jc.simulate(params, plan, key=key)["w"]

    value = jax.jit(value, static_argnums=2)
    np.testing.assert_array_equal(value(1.0), exact)
    np.testing.assert_array_equal(value(0.0), params["w"])
    moving = np.asarray(exact != params["w"]).reshape(8, 8, 10)
    drawn = jax.jit(jax.vmap(lambda k: value(0.3, k, 8) == exact))(jax.random.split(KEY, 300))
    blocks = np.asarray(drawn).reshape(300, 8, 8, 10)
    whole, none = (blocks | ~moving).all(2), (~blocks | ~moving).all(2)
    assert (whole ^ none).all()
    assert abs(whole.mean() - 0.3) < 0.01


@pytest.mark.parametrize("shape", ["affine", "linear"])
def test_relaxed_weights_are_the_proximal_map_found_by_brute_force(shape):
    """Of the regularizer with gaps between levels 0 and 1: its value along the line is integrated from the map."""
    w = jnp.asarray(np.r_[np.linspace(0, 1, 41), 3.0], jnp.float32)
    slack = 0.4
    found = np.asarray(training.Relaxed(bits=3, slack=slack, shape=shape)(w).materialize())[:-1]
    x = np.linspace(0, 1, 41)
    q = np.round(x)
    if shape == "linear":
        # min over v of slack * (v - w)**2 + (1 - slack) * (v - q)**2
        v = np.linspace(-0.5, 1.5, 4001)
        cost = slack * (v - x[:, None]) ** 2 + (1 - slack) * (v - q[:, None]) ** 2
        np.testing.assert_allclose(np.delete(found, 20), np.delete(v[cost.argmin(1)], 20), atol=6e-4)
    else:
        np.testing.assert_allclose(found, np.clip(0.5 + (x - 0.5) / slack, 0, 1), atol=1e-5)


def test_relaxation_goes_from_the_identity_to_hard_rounding(rng):
    w = normal(rng, 40, 6)
    for shape in ("affine", "linear"):
        method = training.Relaxed(bits=3, slack=optax.linear_schedule(1.0, 0.0, 10), shape=shape)
        values = [np.asarray(method(w, jc.Context(step=step)).materialize()) for step in (0, 5, 10)]
        np.testing.assert_allclose(values[0], w, atol=1e-6)
        np.testing.assert_array_equal(values[2], jc.quantize.Int(bits=3)(w).materialize())
        distance = [np.abs(v - values[2]).sum() for v in values]
        assert distance[0] > distance[1] > 0


def test_project_moves_the_weights_along_the_relaxation(rng):
    params = {"w": normal(rng, 20, 3)}
    method = training.Relaxed(bits=3, slack=optax.linear_schedule(1.0, 0.0, 5))
    tx = optax.chain(optax.sgd(0.0), jc.project(jc.plan(params, [("w", method)])))
    state = tx.init(params)
    for _ in range(8):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], jc.quantize.Int(bits=3)(params["w"]).materialize(), atol=1e-5)


# The optimizer's state.


def test_thirty_two_bits_are_the_optimizer_itself(rng):
    params = {"w": normal(rng, 64, 80)}
    grads = jax.tree.map(jnp.sin, params)
    plain, same = optax.adam(1e-2), jc.quantize.moments(optax.adam(1e-2), bits=32)
    a, b = plain.update(grads, plain.init(params), params), same.update(grads, same.init(params), params)
    b = (b[0], b[1].inner)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_moments_are_kept_between_steps_only_and_squares_stay_positive(rng):
    x = normal(rng, 300, 20) * jnp.exp(3 * normal(rng, 300, 20))
    params = {"w": jnp.zeros((300, 20))}
    for tx, name, value in ((optax.trace(0.0), "trace", x), (optax.scale_by_rms(decay=0.0), "nu", x**2)):
        small = jc.quantize.moments(tx, group_size=64)
        updates, state = jax.jit(small.update)({"w": x}, small.init(params), params)
        want, _ = tx.update({"w": x}, tx.init(params), params)
        np.testing.assert_allclose(updates["w"], want["w"], rtol=1e-6)
        held = np.asarray(getattr(state.inner, name)["w"].held.materialize())
        largest = np.asarray(getattr(state.inner, name)["w"].held.scale).repeat(64, 0)[:300]
        assert (np.abs(held - value) <= largest * 0.9 / 64 / (2 if name == "nu" else 1) / 2 * 1.001).all()
        near = np.abs(np.asarray(value)) > 1e-5 * largest
        assert (np.abs(held / value - 1) < 0.5)[near].all()
        if name == "nu":
            assert (held[np.asarray(value) > 0] > 0).all()


def test_small_arrays_vectors_and_counts_are_left_alone(rng):
    params = {"w": normal(rng, 64, 64), "small": normal(rng, 8, 8), "b": jnp.zeros(5000)}
    state = jc.quantize.moments(optax.adam(1e-3), group_size=64).init(params).inner
    plain = optax.adam(1e-3).init(params)
    assert jc.nbits(state) == jc.nbits(plain) - 2 * 64 * 64 * 24 + 2 * 64 * 32
    assert state[0].mu["b"].dtype == jnp.float32 and state[0].count.dtype == jnp.int32
    assert state[0].nu["w"].held.codes.dtype == jnp.uint8


def test_adam_with_moments_of_eight_bits_solves_least_squares(rng, tmp_path):
    x, truth = normal(rng, 256, 64), normal(rng, 64, 64)
    y = x @ truth
    params = {"w": jnp.zeros((64, 64))}

    def loss(p):
        return jnp.square(x @ p["w"] - y).mean()

    def run(tx, steps=600):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, steps)[0])(params)

    rate = optax.cosine_decay_schedule(0.05, 600)
    small = jc.quantize.moments(optax.adam(rate), group_size=32)
    found, state = run(small)
    assert float(loss(params)) > 50
    assert float(loss(run(optax.adam(rate))[0])) < 1e-3
    assert float(loss(found)) < 1e-3
    jc.save(tmp_path / "state", {"leaves": jax.tree.leaves(state)})
    leaves = jc.load(tmp_path / "state")["leaves"]
    again = jax.tree.unflatten(jax.tree.structure(state), leaves)
    grads = jax.grad(loss)(found)
    jax.tree.map(
        np.testing.assert_array_equal, small.update(grads, state, found)[0], small.update(grads, again, found)[0]
    )


# Losses that are put together from what is there.


def test_a_network_distils_itself_into_its_quantized_form(rng):
    """Self-distilled quantization (O'Neill & Dutta 2023): logits and each layer's outputs follow the dense network."""
    teacher = {f"layer{i}": normal(rng, 8, 8, scale=0.5) for i in range(3)}
    x = normal(rng, 256, 8)

    def layers(params):
        h, outputs = x, []
        for w in params.values():
            h = jnp.tanh(h @ w)
            outputs.append(h)
        return outputs

    goal = layers(teacher)

    def distance(params):
        return jnp.stack([jnp.square(a - b).mean() for a, b in zip(layers(params), goal, strict=True)])

    def trained(bits, strength, steps=150):
        plan = jc.plan(teacher, [(".*", training.LSQ(bits=bits, start="range"))])
        train, held = jc.split(jc.compress(teacher, plan))
        tx = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

        def loss(train):
            params = jc.materialize(jc.merge(train, held))
            soft = jc.distill.soft_targets(layers(params)[-1], goal[-1], temperature=2.0)
            return soft + strength * distance(params).sum()

        @jax.jit
        def run(train):
            def step(carry, _):
                train, state = carry
                updates, state = tx.update(jax.grad(loss)(train), state, train)
                return (optax.apply_updates(train, updates), state), None

            return jax.lax.scan(step, (train, tx.init(train)), None, steps)[0][0]

        last = jc.finalize(jc.merge(run(train), held))
        return [np.asarray(jax.jit(distance)(jc.materialize(tree))) for tree in (jc.merge(train, held), last)]

    start, alone = trained(3, 0.0)
    _, guided = trained(3, 10.0)
    assert guided.sum() < start.sum()
    assert guided[:-1].sum() < alone[:-1].sum()
    assert trained(8, 0.0, steps=1)[0].sum() < 1e-3


def test_learned_steps_beat_rounding_a_trained_network(rng):
    x = normal(rng, 256, 16)
    truth = {"a": normal(rng, 16, 32, scale=0.5), "b": normal(rng, 32, 4, scale=0.5)}

    def model(params):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    y = model(truth)

    def error(params):
        return jnp.square(model(params) - y).mean()

    plan = jc.plan(truth, [(".*", training.LSQ(bits=2, start="deviation"))])
    train, held = jc.split(jc.compress(truth, plan))
    tx = optax.adam(optax.cosine_decay_schedule(5e-3, 300))

    @jax.jit
    def run(train):
        def step(carry, _):
            train, state = carry
            grads = jax.grad(lambda t: error(jc.materialize(jc.merge(t, held))))(train)
            updates, state = tx.update(grads, state, train)
            return (optax.apply_updates(train, updates), state), None

        return jax.lax.scan(step, (train, tx.init(train)), None, 300)[0][0]

    final = jc.finalize(jc.merge(run(train), held))
    rounded = jc.compress(truth, jc.plan(truth, [(".*", jc.quantize.Int(bits=2, clip="mse"))]))
    assert float(error(jc.materialize(final))) < 0.5 * float(error(jc.materialize(rounded)))


# Errors.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: training.LSQ(bits=1), "LSQ: bits=1 is not an integer from 2 to 16"),
        (lambda: training.LSQ(start="zero"), "start='zero' is unknown"),
        (lambda: training.LSQ(group_size=0), "group_size=0 must be positive"),
        (lambda: training.DoReFa(bits=9), "DoReFa: bits=9"),
        (lambda: training.TTQ(threshold=1.0), r"threshold=1.0 is outside \[0, 1\)"),
        (lambda: training.QuantNoise(jc.quantize.Int(), rate=1.5), r"rate=1.5 is outside \[0, 1\]"),
        (lambda: training.QuantNoise(jc.quantize.Int(), block_size=0), "block_size=0 must be positive"),
        (lambda: training.Relaxed(slack=-0.1), r"slack=-0.1 is outside \[0, 1\]"),
        (lambda: training.Relaxed(shape="round"), "shape='round' is unknown"),
        (lambda: jc.quantize.moments(optax.adam(1e-3), bits=16), "bits=16 is not an integer from 2 to 8, or 32"),
        (lambda: jc.quantize.round_gradients(0, KEY), "round_gradients: bits=0 is not an integer from 1 to 8"),
        (lambda: training.clip_values().update({}, optax.EmptyState()), "clip_values needs the parameters"),
    ],
)
def test_values_outside_their_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_leaves_that_do_not_fit_are_named():
    params = {"layer": {"kernel": jnp.ones((6, 4))}}
    for method in (training.LSQ(group_size=4), training.DSQ(group_size=4)):
        with pytest.raises(ValueError, match="layer/kernel: group_size 4 does not divide axis -2 of length 6"):
            jc.plan(params, [(".*", method)])
    with pytest.raises(ValueError, match="layer/kernel: axis 3 is out of range"):
        jc.plan(params, [(".*", training.BinaryConnect(axis=3))])
    with pytest.raises(ValueError, match="layer/kernel: QuantNoise needs 'key'"):
        jc.compress(params, jc.plan(params, [(".*", training.QuantNoise(jc.quantize.Int()))]))


def test_the_slope_of_a_step_is_its_level_outside_the_grid_also_where_a_step_became_negative():
    v = jnp.array([[0.3, -0.2], [5.0, -7.0], [-6.0, 4.0]])
    g = jnp.array([[1.0, 2.0], [3.0, -4.0], [0.5, 0.25]])
    for scale in (jnp.array([[0.5, 0.25]]), jnp.array([[-0.5, 0.25]])):
        _, backward = jax.vjp(lambda v, s: fake_quantized.stepped(v, s, 3, (-2,)), v, scale)
        u = np.asarray(v) / np.asarray(scale)
        within = (u > -4) & (u < 3)
        slope = np.where(within, np.round(u) - u, np.clip(np.round(u), -4, 3))
        want = (np.asarray(g) * slope).sum(0, keepdims=True) / np.sqrt(3 * 3)
        of_values, of_scale = backward(g)
        np.testing.assert_array_equal(of_values, np.where(within, g, 0))
        np.testing.assert_allclose(of_scale, want, rtol=1e-5)


def test_values_on_the_ends_of_the_grid_count_as_outside_whatever_the_step(rng):
    scale = jnp.abs(normal(rng, 1, 200))
    v = jnp.concatenate([-4 * scale, 3 * scale, -3.99 * scale, 2.99 * scale])
    _, backward = jax.vjp(lambda v, s: fake_quantized.stepped(v, s, 3, (-2,)), v, scale)
    of_values, of_scale = backward(jnp.ones_like(v))
    np.testing.assert_array_equal(of_values, jnp.array([0.0, 0.0, 1.0, 1.0])[:, None] * jnp.ones((4, 200)))
    np.testing.assert_allclose(of_scale, np.full((1, 200), (-4 + 3 - 0.01 + 0.01) / np.sqrt(4 * 3)), rtol=1e-3)


@pytest.mark.parametrize("make", [training.LSQ, training.DSQ, training.DoReFa])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_what_a_trained_grid_becomes_encodes_its_own_values_to_the_same_codes(rng, tmp_path, make, bits):
    tree = {"w": make(bits=bits)(normal(rng, 64, 8, scale=3.0))}
    node = jc.finalize(tree)["w"]
    if make is training.LSQ and bits < 8:
        assert node.codes.min() == -(2 ** (bits - 1))
    jc.save(tmp_path / "node", {"w": node})
    node = jc.load(tmp_path / "node")["w"]
    again = node.encode(node.materialize())
    np.testing.assert_array_equal(again.codes, node.codes)
    np.testing.assert_array_equal(again.materialize(), node.materialize())


@pytest.mark.parametrize("bits", [9, 12, 16])
@pytest.mark.parametrize("kind", [training.LSQ, training.DSQ, training.Relaxed], ids=lambda x: x.__name__)
def test_trained_grids_of_more_than_eight_bits(kind, bits, rng, tmp_path):
    w = {"w": jnp.asarray(rng.normal(size=(32, 4)), jnp.float32)}
    options = {"start": "range"} if kind is training.LSQ else {}
    tree = jc.compress(w, jc.plan(w, [("w", kind(bits, **options))]))
    small = jc.finalize(tree)
    codes = jax.tree.leaves(small)[0]
    assert codes.dtype == jnp.int16 and int(jnp.abs(codes).max()) >= 2 ** (bits - 1) - 1
    step = 2.0 * float(jnp.abs(w["w"]).max()) / (2**bits - 2)
    assert float(jnp.abs(jc.materialize(small)["w"] - w["w"]).max()) <= 0.51 * step
    np.testing.assert_allclose(jc.materialize(tree)["w"], jc.materialize(small)["w"], atol=1e-6)
    jc.save(tmp_path / "x", small)
    np.testing.assert_array_equal(jc.materialize(jc.load(tmp_path / "x"))["w"], jc.materialize(small)["w"])


@pytest.mark.parametrize("kind", [training.DoReFa, jc.quantize.AdditivePowersOfTwo, jc.quantize.PowersOfTwo])
def test_tables_of_levels_name_the_grid_for_more_bits(kind):
    with pytest.raises(ValueError, match=r"bits=12 is not an integer from 2 to [78]; codes of 12 bits are .*Int\(12\)"):
        kind(bits=12)
