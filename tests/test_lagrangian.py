"""Learning-compression against closed forms, and what it is without compression: plain training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc

H, T = jnp.array([3.0, 1.0, 0.5, 2.0]), jnp.array([1.0, 5.0, -2.0, 0.5])
RATE = 0.1


def slope(params):
    return jax.tree.map(lambda w: H * (w - T), params)


def train(tx, steps, params=None):
    params = {"w": T} if params is None else params

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(slope(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0]

    return run(params)


def planned(method):
    return jc.plan({"w": T}, [("w", method)])


ONE = jc.share.KMeans(clusters=1)


@pytest.mark.parametrize("every", [1, 10])
def test_multipliers_find_the_best_point_of_the_set(every):
    """One value for all: the mean weighted by curvature, where compressing gives the plain mean."""
    params, state = train(optax.chain(optax.sgd(RATE), jc.lc(planned(ONE), every, mu=0.3)), 600)
    best = float((H * T).sum() / H.sum())
    np.testing.assert_allclose(jc.nodes(params, state)["w"].materialize(), best, rtol=1e-4)
    np.testing.assert_allclose(params["w"], best, rtol=1e-4)
    assert abs(best - float(T.mean())) > 0.1


def test_the_penalty_alone_ends_where_its_minimum_is():
    mu = 0.2
    tx = optax.chain(optax.sgd(RATE), jc.lc(planned(ONE), mu=mu, multipliers=False))
    params, state = train(tx, 600)
    weight = mu / RATE
    w = (H * T + weight * params["w"].mean()) / (H + weight)
    np.testing.assert_allclose(params["w"], w, rtol=1e-4)
    assert state[1].multipliers == {}


def test_a_growing_penalty_leads_onto_the_set():
    mu = optax.exponential_decay(1e-3, 100, 10.0)
    tx = optax.chain(optax.adam(0.02), jc.lc(planned(jc.prune.Magnitude(sparsity=0.5)), 5, mu=mu))
    early, _ = train(tx, 20)
    params, state = train(tx, 700)
    dense = jc.materialize(jc.nodes(params, state))["w"]
    assert int((dense == 0).sum()) == 2
    np.testing.assert_allclose(params["w"], dense, atol=1e-4)
    assert float(jnp.abs(early["w"]).min()) > 0.1


def test_the_set_may_tighten_meanwhile():
    ramp = optax.polynomial_schedule(0.0, 0.5, 1, 200)
    method = jc.prune.Magnitude(sparsity=ramp)
    tx = optax.chain(optax.adam(0.02), jc.lc(planned(method), 5, mu=optax.exponential_decay(1e-3, 100, 10.0)))
    zeros = [int((jc.nodes(*train(tx, steps))["w"].materialize() == 0).sum()) for steps in (4, 120, 700)]
    assert zeros == [0, 1, 2]


def test_additive_combinations_are_learned_too():
    matrix = jax.random.normal(jax.random.key(0), (6, 4))
    plan = jc.plan({"w": matrix}, [("w", jc.residual(jc.factorize.SVD(1), jc.prune.Magnitude(sparsity=0.8)))])
    tx = optax.chain(optax.sgd(RATE), jc.lc(plan, 2, mu=optax.exponential_decay(0.1, 10, 3.0)))
    params, state = {"w": matrix}, None
    state = tx.init(params)
    step = jax.jit(lambda p, s: tx.update(jax.tree.map(lambda w: w - matrix, p), s, p))
    for _ in range(60):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(jc.materialize(jc.nodes(params, state))["w"], params["w"], atol=5e-3)
    assert jc.nbits(jc.nodes(params, state)) < 32 * 24


@pytest.mark.parametrize("method", [None, jc.prune.Magnitude(sparsity=0.0), jc.prune.Nonzero()], ids=str)
@pytest.mark.parametrize("every", [1, 3])
def test_without_compression_it_is_plain_training_to_the_bit(method, every):
    plain, _ = train(optax.adam(0.05), 20, {"w": T / 3})
    learned, _ = train(optax.chain(optax.adam(0.05), jc.lc(planned(method), every, mu=0.7)), 20, {"w": T / 3})
    np.testing.assert_array_equal(learned["w"], plain["w"])


def test_without_penalty_it_is_plain_training_to_the_bit():
    plain, _ = train(optax.adam(0.05), 20, {"w": T / 3})
    learned, state = train(optax.chain(optax.adam(0.05), jc.lc(planned(ONE), mu=0.0)), 20, {"w": T / 3})
    np.testing.assert_array_equal(learned["w"], plain["w"])
    np.testing.assert_array_equal(state[1].multipliers["w"], 0)


def test_bad_settings():
    with pytest.raises(ValueError, match=r"lc: mu=-1.0 must be at least 0"):
        jc.lc(planned(ONE), mu=-1.0)
    with pytest.raises(ValueError, match="lc: every=0 must be a positive number of steps"):
        jc.lc(planned(ONE), 0, mu=1.0)
    with pytest.raises(ValueError, match=r"lc: found \{\} of type dict, expected a plan"):
        jc.lc({}, mu=1.0)
