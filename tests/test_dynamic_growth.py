"""Grow and prune: which connections come and go, how many there are, and what is found."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jcompress.prune import dynamic
from jcompress.prune.dynamic import leaves


def leaf(step=0, kept=20, seed=0, momentum=False):
    rng = np.random.default_rng(seed)
    mask = rng.permutation(np.arange(48) < kept).reshape(8, 6)
    w, grad, average = rng.normal(size=(3, 8, 6))
    return leaves.Leaf(
        jnp.asarray(w * mask, jnp.float32), jnp.asarray(mask), jnp.asarray(grad, jnp.float32),
        jnp.asarray(average, jnp.float32) if momentum else None, jnp.int32(step), jax.random.key(seed),
    )  # fmt: skip


def positions(mask):
    return set(np.flatnonzero(mask))


@pytest.mark.parametrize("momentum", [False, True])
def test_before_the_turn_the_dormant_weights_of_largest_gradient_come(momentum):
    found = leaf(step=9, momentum=momentum)
    ((mask,), _) = dynamic.NeST(turn=10, growth=0.3)([found], ())
    dormant = np.flatnonzero(~np.asarray(found.mask))
    slopes = np.abs(np.ravel(found.momentum if momentum else found.grad))[dormant]
    expected = set(dormant[np.argsort(-slopes)[: int(0.3 * 28)]])
    assert positions(mask) == positions(found.mask) | expected


def test_from_the_turn_on_the_active_weights_of_smallest_magnitude_go():
    found = leaf(step=10)
    ((mask,), _) = dynamic.NeST(turn=10, pruning=0.3)([found], ())
    active = np.flatnonzero(found.mask)
    expected = set(active[np.argsort(np.abs(np.ravel(found.w))[active])[:6]])
    assert positions(mask) == positions(found.mask) - expected


def test_from_the_stop_on_masks_stay_and_fractions_may_be_schedules():
    rule = dynamic.NeST(turn=10, stop=20, growth=0.5, pruning=0.5)
    for step, kept in [(0, 34), (9, 34), (10, 10), (19, 10), (20, 20), (99, 20)]:
        assert int(rule([leaf(step)], ())[0][0].sum()) == kept
    falling = dynamic.NeST(pruning=optax.linear_schedule(0.5, 0.0, 10), growth=0.0)
    assert [int(falling([leaf(step)], ())[0][0].sum()) for step in (0, 5, 10)] == [10, 15, 20]
    both = leaf()
    ((mask,), _) = dynamic.NeST(growth=0.25, pruning=0.5)([both], ())
    assert int(mask.sum()) == 20 - 10 + 7  # of the 28 that were dormant


def planted(rng):
    """Sparse weights, of which the seed holds three that are not needed and one that is."""
    x = jnp.asarray(rng.normal(size=(200, 30)), jnp.float32)
    support = np.arange(30) % 5 == 0
    truth = jnp.asarray(np.where(support, 1.0 + np.arange(30) / 30, 0.0)[:, None], jnp.float32)
    seed = {"w": jnp.asarray(np.isin(np.arange(30), [0, 1, 2, 3])[:, None])}
    return x, x @ truth, seed, support


@pytest.mark.parametrize("optimizer", [optax.sgd(0.05, momentum=0.9), optax.adamw(0.05)], ids=["sgd", "adamw"])
def test_the_planted_connections_grow_and_stay(optimizer, rng):
    x, y, seed, support = planted(rng)
    rule = dynamic.NeST(turn=100, stop=300, growth=0.2, pruning=0.12)
    tx = dynamic.sparse(optimizer, rule, seed, every=20)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(lambda p: jnp.mean((x @ p["w"] - y) ** 2))(params), state, params)
        return optax.apply_updates(params, updates), state

    params, before, after = {"w": jnp.full((30, 1), 0.1, jnp.float32)}, 4, 4
    state, counts = tx.init(params), []
    for i in range(400):
        params, state = step(params, state)
        mask = state.masks["w"]
        assert i % 20 == 0 or bool((params["w"][~mask] == 0).all())
        before, after = after, int(mask.sum())
        if i % 20 == 0 and 0 <= i < 100:
            assert after - before == int(0.2 * (30 - before))
        elif i % 20 == 0 and 100 <= i < 300:
            assert before - after == int(0.12 * before)
        else:
            assert after == before
        counts.append(after)
    assert step._cache_size() == 1
    assert max(counts) > 15 and counts[-1] < 10
    assert bool(mask[support].all())
    assert float(jnp.mean((x @ params["w"] - y) ** 2)) < 1e-3


def test_a_new_connection_is_one_step_of_descent_from_zero():
    params, seed = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([True, False])}
    tx = dynamic.sparse(optax.sgd(0.5, momentum=0.9), dynamic.NeST(growth=1.0, pruning=0.0), seed, every=1)
    state, grads = tx.init(params), {"w": jnp.array([0.0, -3.0])}
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert params["w"].tolist() == [1.0, 1.5]


def test_the_gradients_may_be_averaged():
    params, seed = {"w": jnp.zeros(3)}, {"w": jnp.array([True, False, False])}
    rule = dynamic.NeST(growth=optax.linear_schedule(0.0, 0.5, 3), pruning=0.0, decay=0.9)
    tx = dynamic.sparse(optax.sgd(0.0), rule, seed, every=3)
    state = tx.init(params)
    for g in ([0.0, 2.0, 0.0], [0.0, 2.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]):
        _, state = tx.update({"w": jnp.array(g)}, state, params)
    assert state.masks["w"].tolist() == [True, True, False]


def test_wrong_hyperparameters_are_refused():
    with pytest.raises(ValueError, match=r"NeST: growth=1.5 is outside \[0, 1\]"):
        dynamic.NeST(growth=1.5)
    with pytest.raises(ValueError, match=r"NeST: pruning=-0.1 is outside \[0, 1\]"):
        dynamic.NeST(pruning=-0.1)
    with pytest.raises(ValueError, match=r"NeST: decay=1.0 is outside \[0, 1\)"):
        dynamic.NeST(decay=1.0)
    with pytest.raises(ValueError, match="NeST: found turn=9, stop=5"):
        dynamic.NeST(turn=9, stop=5)
