"""Lottery tickets: bit-identical weights, exact fractions, the controls, and the early stop."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc
from jcompress.prune import dynamic


def parameters(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (10, 7)), "bias": jnp.ones(7)},
        "b": jax.random.normal(keys[1], (7, 3)),
    }


@functools.partial(jax.jit, static_argnames="steps")
def train(params, masks, steps=3):
    tx = dynamic.sparse(optax.adamw(0.1), dynamic.Static(), masks)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
        params = optax.apply_updates(params, updates)
    return params


def bits(x):
    return np.asarray(x).view(np.uint32)


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("rewound", [False, True])
def test_tickets_are_bit_identical_on_the_mask_and_kept_fractions_exact(scope, rewound):
    first = parameters()
    early = train(first, {}, steps=1) if rewound else None
    target, history = early if rewound else first, []
    last = dynamic.lottery_ticket(
        train,
        first,
        rounds=4,
        rate=0.2,
        rewind=early,
        scope=scope,
        match="a/kernel|b",
        report=lambda r, t: history.append(t),
    )
    assert len(history) == 4 and history[-1] is last
    sizes = {"a/kernel": 70, "b": 21}
    for number, ticket in enumerate(history, 1):
        found, wanted = dict(jc.paths(ticket.params)), dict(jc.paths(target))
        for path, mask in ticket.masks.items():
            mask = np.asarray(mask)
            np.testing.assert_array_equal(bits(found[path])[mask], bits(wanted[path])[mask])
            np.testing.assert_array_equal(bits(found[path])[~mask], 0)
            if scope == "leaf":
                assert abs(mask.sum() - sizes[path] * 0.8**number) <= 0.5
        assert scope == "leaf" or abs(sum(int(m.sum()) for m in ticket.masks.values()) - 91 * 0.8**number) <= 0.5
        np.testing.assert_array_equal(bits(found["a/bias"]), bits(wanted["a/bias"]))
    for before, after in itertools.pairwise(history):
        assert all(bool((before.masks[p] | ~after.masks[p]).all()) for p in sizes)
        trained = dict(jc.paths(after.trained))
        assert all(bool((jnp.where(before.masks[p], 0, trained[p]) == 0).all()) for p in sizes)


def test_a_round_prunes_the_smallest_trained_weights():
    params = parameters()
    ticket = dynamic.lottery_ticket(train, params, 1, 0.3, match="b")
    trained = np.abs(np.asarray(train(params, {"b": jnp.ones((7, 3), bool)})["b"]))
    assert set(np.flatnonzero(~ticket.masks["b"])) == set(np.argsort(trained.ravel())[:6])


def test_the_control_has_the_masks_and_other_weights():
    ticket = dynamic.lottery_ticket(train, parameters(), 2, 0.5, match="b")
    control = dynamic.lay(parameters(seed=1), ticket.masks)
    np.testing.assert_array_equal(np.asarray(control["b"] != 0), np.asarray(ticket.masks["b"]))
    assert not bool((control["b"] == ticket.params["b"])[ticket.masks["b"]].any())


def test_the_distance_is_symmetric_and_counts_entries():
    a, b = {"x": jnp.array([True, False, True])}, {"x": jnp.array([True, True, False])}
    assert float(dynamic.mask_distance(a, b)) == float(dynamic.mask_distance(b, a)) == pytest.approx(2 / 3)
    assert float(dynamic.mask_distance(a, a)) == 0.0


def test_early_bird_waits_for_a_window_of_small_distances():
    still, other = {"x": jnp.arange(20) < 10}, {"x": jnp.arange(20) >= 10}
    state, stops = dynamic.early_bird(still, window=3), []
    update = jax.jit(dynamic.EarlyBird.update)
    for masks in [still, other, other, other, other]:
        state = update(state, masks)
        stops.append(bool(state.stop(0.1)))
    assert stops == [False, False, False, False, True]
    near = {"x": state.masks["x"].at[0].set(True)}  # one of twenty
    assert bool(update(state, near).stop(0.1)) and not bool(update(state, near).stop(0.05))


def test_errors_name_what_is_wrong():
    params = parameters()
    for kwargs, message in [
        ({"rate": 1.0}, r"rate=1.0 is outside \(0, 1\)"),
        ({"rounds": 0}, "rounds=0 must be positive"),
        ({"scope": "all"}, "scope='all' is unknown"),
        ({"match": "c"}, "lottery_ticket: match: 'c' matches no parameter"),
    ]:
        with pytest.raises(ValueError, match=message):
            dynamic.lottery_ticket(train, params, **{"rounds": 1, "rate": 0.5, **kwargs})
    with pytest.raises(ValueError, match="window=0 must be positive"):
        dynamic.early_bird({}, window=0)
    with pytest.raises(ValueError, match="expected the same"):
        dynamic.mask_distance({"a": jnp.ones(2, bool)}, {"b": jnp.ones(2, bool)})
