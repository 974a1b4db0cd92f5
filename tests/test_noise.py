"""Heavy-tailed noise and the penalty on curvature."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import jcompress as jc
from jcompress.prune import penalties

KEY = jax.random.key(11)


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.5, 1.9, 2.0])
def test_the_characteristic_function_is_that_of_a_stable_law(alpha):
    x = np.asarray(jax.jit(lambda a: penalties.stable(KEY, a, (40_000,)))(alpha), np.float64)
    assert np.isfinite(x).all()
    for t in (0.2, 0.7, 1.5, 3.0):
        assert abs(np.exp(1j * t * x).mean() - np.exp(-(t**alpha))) < 0.015


@pytest.mark.parametrize(("alpha", "law"), [(2.0, stats.norm(scale=np.sqrt(2))), (1.0, stats.cauchy())])
def test_the_known_members_of_the_family(alpha, law):
    assert stats.kstest(np.asarray(penalties.stable(KEY, alpha, (5_000,))), law.cdf).pvalue > 0.01


def test_a_few_heavy_tailed_weights_carry_nearly_all_of_the_norm():
    """What is left of the norm without the largest tenth falls with n for heavy tails, and stays for Gaussian ones."""

    def left(alpha, n):
        x = np.sort(np.abs(np.asarray(penalties.stable(KEY, alpha, (20, n)), np.float64)))
        return np.median(np.linalg.norm(x[:, : -n // 10], axis=1) / np.linalg.norm(x, axis=1))

    heavy, light = [left(1.2, n) for n in (100, 1_000, 10_000)], [left(2.0, n) for n in (100, 1_000, 10_000)]
    assert heavy[0] > 1.5 * heavy[1] > 2 * heavy[2]
    np.testing.assert_allclose(light, 0.75, atol=0.02)


def test_the_transform_adds_scaled_noise_that_differs_by_step_and_leaf():
    params = {"a": jnp.zeros((100, 50)), "b": jnp.zeros((100, 50), jnp.bfloat16)}
    rate, alpha = optax.linear_schedule(0.4, 0.1, 1), 1.5
    tx = penalties.add_stable_noise(0.3, rate, alpha, KEY)
    state, update = tx.init(params), jax.jit(tx.update)
    drawn = []
    for step in range(2):
        updates, state = update(params, state)
        drawn.append(np.asarray(updates["a"], np.float64) / (0.3 * float(rate(step)) ** (1 / alpha)))
        assert updates["b"].dtype == jnp.bfloat16
        assert not np.array_equal(updates["a"].astype(jnp.bfloat16), updates["b"])
    assert not np.allclose(drawn[0], drawn[1])
    for x in drawn:
        assert abs(np.exp(1j * x).mean() - np.exp(-1)) < 0.05
    again, _ = tx.update(params, tx.init(params))
    np.testing.assert_allclose(again["a"] / (0.3 * 0.4 ** (1 / alpha)), drawn[0], rtol=1e-3)


def test_an_index_outside_its_range_is_refused():
    for bad in (0.0, 2.5, -1.0):
        with pytest.raises(ValueError, match=rf"alpha={bad} is outside \(0, 2\]"):
            penalties.stable(KEY, bad)
        with pytest.raises(ValueError, match=rf"alpha={bad} is outside \(0, 2\]"):
            penalties.add_stable_noise(0.1, 0.1, bad, KEY)


# Curvature.


@pytest.fixture
def problem(rng):
    x, y = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(16, 3), (16,)])
    params = {"a": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), "b": jnp.asarray(rng.normal(size=2), jnp.float32)}
    return lambda p: jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - y) ** 2), params


def exact(loss, params):
    blocks = jax.tree.leaves(jax.hessian(loss)(params))
    return sum(jnp.sum(block**2) for block in blocks)


def test_the_estimate_is_unbiased(problem):
    loss, params = problem
    drawn = jax.jit(
        jax.vmap(lambda k: penalties.hessian_square_norm(loss, params, k)),
    )(jax.random.split(KEY, 4_000))
    error = float(drawn.std()) / np.sqrt(4_000)
    assert error < 0.05 * float(exact(loss, params))
    np.testing.assert_allclose(drawn.mean(), exact(loss, params), atol=4 * error)


def test_many_samples_come_near_the_exact_value_and_gradient():
    def loss(p):
        return p[0] ** 2 * p[1] + jnp.sin(p[1])

    p = jnp.array([0.7, -1.2])

    def estimate(p):
        return penalties.hessian_square_norm(loss, p, KEY, samples=20_000)

    value, gradient = jax.value_and_grad(estimate)(p)
    np.testing.assert_allclose(value, exact(loss, p), rtol=0.02)
    np.testing.assert_allclose(gradient, jax.grad(lambda p: exact(loss, p))(p), rtol=0.05, atol=0.05)


def test_the_penalty_flattens(problem):
    loss, params = problem
    tx = optax.adam(0.02)

    def train(strength):
        def objective(p, key):
            return loss(p) + strength * jnp.sqrt(penalties.hessian_square_norm(loss, p, key))

        def step(carry, key):
            p, state = carry
            updates, state = tx.update(jax.grad(objective)(p, key), state, p)
            return (optax.apply_updates(p, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(KEY, 150))[0][0]

    both = jax.jit(jax.vmap(train))(jnp.array([0.0, 0.3]))
    plain, flat = (jax.tree.map(lambda x, i=i: x[i], both) for i in range(2))
    assert float(exact(loss, flat)) < 0.7 * float(exact(loss, plain))


def test_what_is_trained_under_the_penalty_loses_less_by_rounding(rng):
    x = jnp.asarray(rng.normal(size=(64, 3)), jnp.float32)
    y, tx = jnp.sin(x[:, 0] * x[:, 1]), optax.adam(0.02)

    def loss(p):
        return jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - y) ** 2)

    def train(c, key):
        first, second, key = jax.random.split(key, 3)
        p = {"a": jax.random.normal(first, (3, 8)), "b": 0.5 * jax.random.normal(second, (8,))}

        def objective(p, key):
            return (1 - c) * loss(p) + c * jnp.sqrt(penalties.hessian_square_norm(loss, p, key))

        def step(carry, key):
            p, state = carry
            updates, state = tx.update(jax.grad(objective)(p, key), state, p)
            return (optax.apply_updates(p, updates), state), None

        return jax.lax.scan(step, (p, tx.init(p)), jax.random.split(key, 300))[0][0]

    def rounded(p, bits):
        plan = jc.plan(p, [(".*", jc.quantize.Int(bits=bits, axis=None))])
        return loss(jc.materialize(jc.compress(p, plan)))

    keys = jax.random.split(KEY, 8)
    plain, flat = (jax.jit(jax.vmap(train, (None, 0)))(c, keys) for c in (0.0, 0.02))
    losses = [float(jax.vmap(loss)(p).mean()) for p in (plain, flat)]
    assert losses[1] < 2 * losses[0]
    for bits in (2, 3):
        after = [float(jax.vmap(lambda p, bits=bits: rounded(p, bits))(p).mean()) for p in (plain, flat)]
        assert after[1] < after[0]
        assert after[1] - losses[1] < 0.6 * (after[0] - losses[0])


def test_no_samples_are_refused(problem):
    with pytest.raises(ValueError, match="samples=0 must be positive"):
        penalties.hessian_square_norm(*problem, KEY, samples=0)
