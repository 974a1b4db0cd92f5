"""Deep rewiring, and dense weights behind a sparse view."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jcompress.prune import dynamic

KEY = jax.random.key(0)


def run(tx, params, steps, gradient):
    """Parameters and states after each step, under one compilation."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    state, seen = tx.init(params), []
    for _ in range(steps):
        params, state = step(params, state)
        seen.append((params, state))
    assert step._cache_size() == 1
    return seen


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def masks_of(params, kept):
    return {p: jnp.arange(x.size).reshape(x.shape) % x.size < kept for p, x in params.items()}


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_deep_rewiring_keeps_the_count_and_the_signs(scope):
    params = {"a": normal((8, 6)), "b": normal((6, 4), 1)}
    tx = dynamic.deep_rewiring(
        optax.adam(0.05), masks_of(params, 12), key=KEY, learning_rate=0.05, l1=1e-2, temperature=0.5, scope=scope
    )
    before, changed, moved = masks_of(params, 12), 0, set()
    for now, state in run(tx, params, 12, lambda p: jax.tree.map(jnp.sin, p)):
        counts = {p: int(m.sum()) for p, m in state.masks.items()}
        assert sum(counts.values()) == 24
        assert scope == "global" or set(counts.values()) == {12}
        moved |= set(counts.values())
        adam = state.inner[0]
        for path, w in now.items():
            grown = state.masks[path] & ~before[path]
            changed += int(grown.sum())
            idle = ~state.masks[path] | grown
            for x in (w, adam.mu[path], adam.nu[path]):
                assert bool((jnp.where(idle, x, 0.0) == 0.0).all())
            assert bool((w * jnp.where(params[path] < 0, -1, 1) >= 0).all())
        before = state.masks
    assert changed > 0
    assert (len(moved) > 1) == (scope == "global")


def test_the_noise_of_deep_rewiring_has_variance_twice_rate_times_temperature():
    params = {"w": jnp.full(20_000, 100.0)}
    eta, temperature, l1 = 0.1, 0.3, 2.0
    tx = dynamic.deep_rewiring(
        optax.sgd(eta), masks_of(params, 20_000), key=KEY, learning_rate=eta, l1=l1, temperature=temperature
    )
    moves = np.asarray(run(tx, params, 1, lambda p: jax.tree.map(jnp.ones_like, p))[0][0]["w"], np.float64) - 100
    assert moves.mean() == pytest.approx(-eta - eta * l1, abs=5 * (2 * eta * temperature / 20_000) ** 0.5)
    assert moves.var() == pytest.approx(2 * eta * temperature, rel=5 * (2 / 20_000) ** 0.5)


def test_dormant_weights_are_reactivated_uniformly():
    params = {"w": jnp.array([1.0, 1.0, 1.0, -1.0, 1.0, 1.0])}
    counts = np.zeros(6)

    @jax.jit
    def grown(key):
        # The first weight changes its sign; one of all others that are dormant, or itself, takes its place.
        tx = dynamic.deep_rewiring(optax.sgd(2.0), masks_of(params, 2), learning_rate=1.0, key=key)
        return tx.update({"w": jnp.array([1.0, 0, 0, 0, 0, 0])}, tx.init(params), params)[1].masks["w"]

    draws = np.asarray(jax.vmap(grown)(jax.random.split(jax.random.key(0), 3000)))
    assert (draws.sum(1) == 2).all() and draws[:, 1].all()
    counts = draws.mean(0)[[0, 2, 3, 4, 5]]
    assert np.abs(counts - 0.2).max() < 5 * (0.16 / 3000) ** 0.5


def test_surgery_has_a_band_with_memory_and_splices_back():
    rule = dynamic.Surgery(low=0.5, high=1.0)
    w = jnp.array([0.4, 0.7, 0.7, 1.0, -1.2, -0.3])
    mask = jnp.array([True, True, False, False, False, False])
    seen, learning = rule(w, mask, 0)
    assert learning is None
    assert seen.tolist() == [False, True, False, True, True, False]
    # A weight shrinks, is cut, grows behind the mask, and returns at the upper threshold only.
    params, tx = {"w": jnp.array([1.1, 2.0])}, dynamic.latent(optax.sgd(0.1), rule)
    path, state = [], tx.init(params)
    for g in [4.0, 4.0, -1.0, -3.0, -3.0]:
        updates, state = tx.update({"w": jnp.array([g, 0.0])}, state, params)
        params = optax.apply_updates(params, updates)
        path.append((round(float(state.weights["w"][0]), 4), float(params["w"][0]) != 0))
    assert path == [(0.7, True), (0.3, False), (0.4, False), (0.7, False), (1.0, True)]


def test_surgery_thresholds_may_count_in_means():
    w = jnp.array([1.0, 3.0, 8.0])  # mean 4
    whole = jnp.ones(3, bool)
    assert dynamic.Surgery(0.5, 1.0, relative=True)(w, whole, 0)[0].tolist() == [False, True, True]


def test_top_kast_learns_on_more_than_it_sees():
    params = {"w": normal((10, 10)), "bias": jnp.ones(3)}
    tx = dynamic.latent(optax.sgd(0.1), dynamic.TopKAST(forward=0.9, backward=0.7), match="w")
    before = np.asarray(params["w"])
    for i, (now, state) in enumerate(run(tx, params, 4, lambda p: jax.tree.map(jnp.ones_like, p))):
        latent = np.asarray(state.weights["w"])
        order = np.argsort(-np.abs(before).ravel(), kind="stable")
        learning = np.isin(np.arange(100), order[:30]).reshape(10, 10)
        np.testing.assert_allclose(latent, before - 0.1 * learning, rtol=1e-6, atol=1e-7)
        assert int(state.masks["w"].sum()) == 10 and int(state.learning["w"].sum()) == 30
        assert bool((state.learning["w"] | ~state.masks["w"]).all())
        seen = np.argsort(-np.abs(latent).ravel(), kind="stable")[:10]
        assert set(np.flatnonzero(now["w"])) == set(seen)
        np.testing.assert_allclose(np.asarray(now["w"]).ravel()[seen], latent.ravel()[seen], rtol=1e-5)
        np.testing.assert_allclose(np.asarray(now["bias"]), 1 - 0.1 * (i + 1), rtol=1e-6)
        before = latent


def test_the_exploration_penalty_pulls_harder_on_what_is_not_seen():
    rule = dynamic.TopKAST(forward=0.5, backward=0.25, decay=0.1)
    w = jnp.array([4.0, -3.0, 2.0, 1.0])
    seen, learning = rule(w, jnp.ones(4, bool), 0)
    np.testing.assert_allclose(np.asarray(rule.pull(w, seen, learning)), [0.4, -0.3, 0.4, 0.2], rtol=1e-6)
    tx = dynamic.latent(optax.sgd(1.0), rule)
    state = tx.init({"w": w})
    _, state = tx.update({"w": jnp.zeros(4)}, state, {"w": w})
    np.testing.assert_allclose(np.asarray(state.weights["w"]), [3.6, -2.7, 1.6, 1.0], rtol=1e-6)


def test_masks_stay_between_updates():
    params = {"w": normal((10, 10))}
    tx = dynamic.latent(optax.sgd(0.5), dynamic.TopKAST(forward=0.9, backward=0.0), every=3)
    states = [s.masks["w"] for _, s in run(tx, params, 6, lambda p: {"w": p["w"] + normal((10, 10), 1)})]
    same = [bool((a == b).all()) for a, b in itertools.pairwise(states)]
    assert same == [True, True, False, True, True]


def test_errors_name_what_is_wrong():
    params = {"w": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"low=2.0, high=1.0; expected 0 <= low <= high"):
        dynamic.Surgery(2.0, 1.0)
    with pytest.raises(ValueError, match=r"backward=0.9 above forward=0.5"):
        dynamic.TopKAST(0.5, 0.9)
    with pytest.raises(ValueError, match="latent: match: 'v' matches no parameter"):
        dynamic.latent(optax.sgd(1.0), dynamic.Surgery(0, 1), match="v").init(params)
    with pytest.raises(ValueError, match="every=0 must be a positive"):
        dynamic.latent(optax.sgd(1.0), dynamic.Surgery(0, 1), every=0)
    tx = dynamic.latent(optax.sgd(1.0), dynamic.Surgery(0, 1))
    with pytest.raises(ValueError, match="latent needs the parameters"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="scope='all' is unknown"):
        dynamic.deep_rewiring(optax.sgd(1.0), {}, key=KEY, learning_rate=1.0, scope="all")
    tx = dynamic.deep_rewiring(optax.sgd(1.0), masks_of(params, 2), key=KEY, learning_rate=1.0)
    with pytest.raises(ValueError, match="deep_rewiring needs the parameters"):
        tx.update(params, tx.init(params))
