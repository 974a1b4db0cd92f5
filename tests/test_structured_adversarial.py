"""Soft masks, the game of a discriminator and a masked network, and what is left after it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc
from jcompress.prune import penalties, structured


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def convolve(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def network(params, x, gates=None):
    """A convolution, a dense layer behind a flattening, and an output."""
    h = jax.nn.relu(convolve(x, params["a"]) + params["bias"])
    h = h * (1 if gates is None else gates[0])
    h = jax.nn.relu(h.reshape(x.shape[0], -1) @ params["b"])
    return (h * (1 if gates is None else gates[1])) @ params["c"]


@pytest.fixture
def problem(rng):
    params = {"a": normal(rng, 3, 3, 2, 4), "bias": normal(rng, 4), "b": normal(rng, 36, 5), "c": normal(rng, 5, 3)}
    x = normal(rng, 6, 3, 3, 2)
    return params, x, jc.trace.coupling(network, params, x)


def named(groups, path):
    return next(name for name, group in groups.items() if group.prunable and path in dict(group.producers))


def test_scaled_parameters_scale_the_outputs_of_units(problem, rng):
    params, x, groups = problem
    gates = normal(rng, 4), normal(rng, 5)
    masks = {named(groups, "a"): gates[0], named(groups, "b"): gates[1]}

    def scaled(masks):
        return network(structured.scaled(params, groups, masks), x)

    np.testing.assert_allclose(scaled(masks), network(params, x, gates), rtol=2e-4, atol=2e-4)
    found = jax.grad(lambda m: scaled(m).sum())(masks)
    exact = jax.grad(lambda g: network(params, x, g).sum())(gates)
    np.testing.assert_allclose(found[named(groups, "a")], exact[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found[named(groups, "b")], exact[1], rtol=1e-3, atol=1e-3)


def test_units_of_mask_zero_are_those_that_shrinking_cuts(problem):
    params, x, groups = problem
    masks = {named(groups, "a"): jnp.array([1.5, 0.0, 0.3, 0.0]), named(groups, "b"): jnp.array([0.0, 1, 1, 0.5, 0])}
    keep = {name: np.asarray(mask != 0) for name, mask in masks.items()}
    soft = structured.scaled(params, groups, masks)
    small_fn, small = jc.shrink(network, soft, keep, x)
    assert sum(w.size for w in jax.tree.leaves(small)) < 0.5 * sum(w.size for w in jax.tree.leaves(params))
    np.testing.assert_allclose(small_fn(small, x), network(soft, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("regularization", [0.0, 0.7])
def test_the_best_discriminator_is_the_ratio_of_the_laws(regularization, rng):
    """Laws on five points: the loss is the mean over them, and its minimum is known."""
    p, q = rng.dirichlet(np.ones(5), size=2)
    counts = [np.round(1000 * x).astype(int) for x in (p, q)]
    teacher, student = (np.repeat(np.arange(5), c) for c in counts)
    p, q = (c / c.sum() for c in counts)

    def loss(logits):
        return structured.discriminator_loss(logits[teacher], logits[student], regularization)

    best = jnp.asarray(np.log((p + regularization * q) / q), jnp.float32)
    np.testing.assert_allclose(jax.grad(loss)(best), 0, atol=1e-5)
    assert all(float(loss(best + 0.3 * normal(rng, 5))) > float(loss(best)) for _ in range(20))
    if not regularization:
        middle = (p + q) / 2
        divergence = 0.5 * (p * np.log(p / middle)).sum() + 0.5 * (q * np.log(q / middle)).sum()
        np.testing.assert_allclose(loss(best), 2 * np.log(2) - 2 * divergence, rtol=1e-5)


def test_the_network_is_drawn_to_the_teacher_and_across_the_boundary(rng):
    student, teacher, w = normal(rng, 7, 3), normal(rng, 7, 3), normal(rng, 3)

    def loss(student, teacher, adversarial):
        return structured.generator_loss(student, teacher, student @ w, adversarial)

    found, none = jax.grad(loss, (0, 1))(student, teacher, 0.4)
    certain = jax.nn.sigmoid(student @ w)[:, None]
    np.testing.assert_allclose(found, (student - teacher - 0.4 * (1 - certain) * w) / 7, rtol=1e-4, atol=1e-6)
    assert not none.any()
    exact = 0.5 * np.square(np.asarray(student - teacher)).sum(1).mean()
    np.testing.assert_allclose(loss(student, teacher, 0.0), exact, rtol=1e-5)


def mlp(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def play(strength, steps=300):
    """The game on random inputs, for a teacher of ten hidden units of which four matter."""
    rng = np.random.default_rng(0)
    out = normal(rng, 10, 4).at[4:].multiply(0.02)
    weights = {"a": normal(rng, 6, 10), "b": out}
    groups = jc.trace.coupling(mlp, weights, jnp.ones((2, 6)))
    (name,) = [name for name, group in groups.items() if group.prunable]
    params = {"weights": weights, "masks": {name: jnp.ones(10)}}
    judge = {"u": normal(rng, 4, 16) / 2, "v": normal(rng, 16) / 4}
    rate, kinds = 0.02, {"weights": "weights", "masks": "masks"}
    fista = penalties.accelerated(penalties.L1(strength), rate)
    tx, ours = optax.partition({"weights": optax.sgd(1e-3), "masks": fista}, kinds), optax.adam(1e-3)

    def logits(judge, y):
        return jnp.tanh(y @ judge["u"]) @ judge["v"]

    def student(params, x):
        return mlp(structured.scaled(params["weights"], groups, params["masks"]), x)

    def step(carry, key):
        params, judge, state, judging = carry
        x = jax.random.normal(key, (64, 6))
        wanted = mlp(weights, x)

        def telling(judge):
            return structured.discriminator_loss(logits(judge, wanted), logits(judge, student(params, x)), 1.0)

        def fooling(params):
            y = student(params, x)
            return structured.generator_loss(y, wanted, logits(judge, y), 0.1)

        updates, judging = ours.update(jax.grad(telling)(judge), judging)
        judge = optax.apply_updates(judge, updates)
        updates, state = tx.update(jax.grad(fooling)(params), state, params)
        return (optax.apply_updates(params, updates), judge, state, judging), None

    start = params, judge, tx.init(params), ours.init(judge)
    keys = jax.random.split(jax.random.key(1), steps)
    params, _, state, _ = jax.jit(lambda: jax.lax.scan(step, start, keys)[0])()
    iterate = state.inner_states["masks"].inner_state.iterate["masks"]
    return weights, groups, {**params, "masks": iterate}


def test_the_game_cuts_exactly_the_units_that_do_not_matter_and_reads_no_labels():
    weights, groups, params = play(0.15)
    ((name, mask),) = params["masks"].items()
    assert (mask != 0).tolist() == [True] * 4 + [False] * 6
    x = jax.random.normal(jax.random.key(9), (200, 6))
    soft = structured.scaled(params["weights"], groups, params["masks"])
    small_fn, small = jc.shrink(mlp, soft, {name: np.asarray(mask != 0)}, x)
    assert small["a"].shape == (6, 4)
    wanted = mlp(weights, x)
    error = float(jnp.mean((small_fn(small, x) - wanted) ** 2) / jnp.mean(wanted**2))
    assert error < 0.01
    _, _, without = play(0.0)
    assert bool((without["masks"][name] != 0).all())


def test_what_does_not_fit_is_refused_by_name(problem):
    params, _, groups = problem
    name = named(groups, "b")
    with pytest.raises(ValueError, match=r"found a mask of shape \(4,\), expected \(5,\)"):
        structured.scaled(params, groups, {name: jnp.ones(4)})
    with pytest.raises(ValueError, match="hiden: there is no such group"):
        structured.scaled(params, groups, {"hiden": jnp.ones(4)})
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) and \(3,\)"):
        structured.generator_loss(jnp.ones((2, 3)), jnp.ones(3), jnp.ones(2))
    with pytest.raises(ValueError, match=r"regularization=-1.0 must not be negative"):
        structured.discriminator_loss(jnp.ones(2), jnp.ones(2), -1.0)
