"""Optimizers that drive units to zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc
from jcompress.prune import penalties, structured


def mlp(p, x):
    return jax.nn.relu(x @ p["a"] + p["bias"]) @ p["b"]


@pytest.fixture
def params(rng):
    shapes = {"a": (4, 6), "bias": (6,), "b": (6, 2)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


@pytest.fixture
def groups(params):
    found = jc.trace.coupling(mlp, params, jnp.ones((3, 4)))
    return {"hidden": next(g for g in found.values() if ("a", 1) in g.members)}


def stepped(tx, params, grads, state=None):
    updates, state = tx.update(grads, tx.init(params) if state is None else state, params)
    return optax.apply_updates(params, updates), state


def zeros(params):
    return jax.tree.map(jnp.zeros_like, params)


def train(tx, params, x, y, steps, penalty=lambda p: 0.0):
    @jax.jit
    def step(p, state):
        grads = jax.grad(lambda p: jnp.mean((mlp(p, x) - y) ** 2) + penalty(p))(p)
        return stepped(tx, p, grads, state)

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


# Group lasso.


def test_the_penalty_is_the_sum_of_norms(params, groups):
    norms = np.linalg.norm(params["a"], axis=0)
    np.testing.assert_allclose(structured.group_lasso(params, groups), norms.sum(), rtol=1e-6)
    weighted = structured.group_lasso(params, groups, weighted=True)
    np.testing.assert_allclose(weighted, 2 * norms.sum(), rtol=1e-6)
    coupled = np.concatenate([params["a"], params["bias"][None], np.asarray(params["b"]).T])
    everything = structured.group_lasso(params, groups, members="all")
    np.testing.assert_allclose(everything, np.linalg.norm(coupled, axis=0).sum(), rtol=1e-6)


def test_its_gradient_is_the_unit_vector_and_zero_at_zero(params, groups):
    params["a"] = params["a"].at[:, 2].set(0)
    grad = jax.grad(structured.group_lasso)(params, groups)["a"]
    norms = np.linalg.norm(params["a"], axis=0)
    np.testing.assert_allclose(grad, params["a"] / np.where(norms > 0, norms, 1), rtol=1e-5)
    assert bool(jnp.all(jnp.isfinite(jax.grad(structured.group_lasso)(zeros(params), groups)["a"])))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_proximal_step_is_the_minimum_on_a_grid(weighted):
    strength, w = 0.7, np.array([1.3, -0.9])
    params = {"a": jnp.asarray(w[:, None], jnp.float32)}
    groups = {"g": jc.trace.Group(size=1, producers=(("a", 1),))}
    tx = structured.group_lasso_proximal(groups, strength, weighted=weighted)
    found = stepped(tx, params, zeros(params))[0]["a"].ravel()
    axis = np.linspace(-2, 2, 801)
    grid = np.stack(np.meshgrid(axis, axis), -1)
    factor = np.sqrt(2) if weighted else 1
    value = np.sum((grid - w) ** 2, -1) / 2 + strength * factor * np.linalg.norm(grid, axis=-1)
    best = grid.reshape(-1, 2)[np.argmin(value)]
    np.testing.assert_allclose(found, best, atol=0.006)


def test_small_units_become_exactly_zero_and_the_rest_is_left_alone(params, groups):
    params["a"] = params["a"].at[:, 1].multiply(1e-2)
    tx = optax.chain(optax.adamw(1e-3), structured.group_lasso_proximal(groups, 0.1))
    grads = jax.tree.map(jnp.ones_like, params)
    new, _ = stepped(tx, params, grads)
    plain, _ = stepped(optax.adamw(1e-3), params, grads)
    assert new["a"][:, 1].tolist() == [0.0] * 4
    assert bool(jnp.all(new["b"] == plain["b"]))
    assert bool(jnp.all(new["bias"] == plain["bias"]))
    norm = jnp.linalg.norm(plain["a"][:, 0])
    np.testing.assert_allclose(new["a"][:, 0], plain["a"][:, 0] * (1 - 0.1 / norm), rtol=1e-5)
    again, _ = stepped(tx, zeros(params), zeros(params))
    assert not bool(jnp.any(again["a"])), "no NaN where all is zero"


def test_proximal_training_gives_exact_zeros_where_the_subgradient_does_not(params, groups, rng):
    """The target needs two of six units; it is learned all the same."""
    x = jnp.asarray(rng.normal(size=(64, 4)), jnp.float32)
    y = jax.nn.relu(x[:, :2]) @ jnp.array([[1.0, 2.0], [2.0, -1.0]])
    proximal = structured.group_lasso_proximal(groups, 0.05 * 0.06, members="producers")
    by_proximal = train(optax.chain(optax.sgd(0.05), proximal), params, x, y, 600)
    by_penalty = train(
        optax.sgd(0.05), params, x, y, 600, lambda p: 0.06 * structured.group_lasso(p, groups, members="producers")
    )
    dead = jnp.all(by_proximal["a"] == 0, axis=0)
    assert 1 <= int(dead.sum()) <= 4
    assert not bool(jnp.any(jnp.all(by_penalty["a"] == 0, axis=0)))
    assert bool(jnp.all(by_proximal["bias"][dead] == 0))
    keep = {next(iter(groups)): ~dead}
    full = mlp(by_proximal, x)
    cut = by_proximal | {"b": jnp.where(keep["hidden"][:, None], by_proximal["b"], 0)}
    assert bool(jnp.all(mlp(cut, x) == full)), "units that are zero can be cut"
    assert float(jnp.mean((full - y) ** 2)) < 0.1 * float(jnp.var(y))


def test_units_that_share_weights_have_no_proximal_step():
    params = {"a": jnp.ones((2, 2))}
    groups = {"g": jc.trace.Group(size=2, producers=(("a", 0), ("a", 1)))}
    tx = structured.group_lasso_proximal(groups, 0.1)
    with pytest.raises(ValueError, match=r"a: found units on its axes 0 and 1, so weights belong to two"):
        stepped(tx, params, zeros(params))


def test_strength_may_be_a_schedule(params, groups):
    tx = structured.group_lasso_proximal(groups, optax.linear_schedule(0.0, 1e3, 1))
    new, state = stepped(tx, params, zeros(params))
    np.testing.assert_array_equal(new["a"], params["a"])
    new, _ = stepped(tx, new, zeros(params), state)
    assert not bool(jnp.any(new["a"]))


# Scales of norms.


def test_soft_thresholds_are_the_minimum_on_a_grid():
    params = {"scale": jnp.array([0.9, -0.9, 0.2]), "other": jnp.array([0.1])}
    new, _ = stepped(penalties.proximal(penalties.L1(0.3), 1.0, match=".*scale"), params, zeros(params))
    axis = np.linspace(-1, 1, 2001)
    best = [axis[np.argmin((axis - w) ** 2 / 2 + 0.3 * np.abs(axis))] for w in (0.9, -0.9, 0.2)]
    np.testing.assert_allclose(new["scale"], best, atol=1e-3)
    assert new["scale"][2] == 0
    assert new["other"].tolist() == params["other"].tolist()


def test_the_subgradient_is_that_of_the_penalty():
    params = {"scale": jnp.array([0.9, -0.9, 0.0]), "other": jnp.array([0.1])}
    grads = {"scale": jnp.array([1.0, 1.0, 1.0]), "other": jnp.array([1.0])}
    found = structured.add_l1(0.25).update(grads, optax.EmptyState(), params)[0]
    assert found == {"scale": found["scale"], "other": grads["other"]}
    assert found["scale"].tolist() == [1.25, 0.75, 1.0]
    with pytest.raises(ValueError, match=r"add_l1: match: '.\*gamma' matches no parameter"):
        structured.add_l1(0.25, ".*gamma").update(grads, optax.EmptyState(), params)


# Soft filter pruning.


def test_weak_filters_are_zero_every_so_often(params, groups):
    tx = optax.chain(optax.sgd(0.01), structured.soft_filter(groups, sparsity=0.5, every=3))
    state, counts = tx.init(params), []
    order = jnp.argsort(jnp.linalg.norm(params["a"], axis=0))
    for _ in range(6):
        params, state = stepped(tx, params, jax.tree.map(lambda w: 1e-3 * jnp.ones_like(w), params), state)
        counts.append(int(jnp.all(params["a"] == 0, axis=0).sum()))
        if counts[-1]:
            assert not bool(jnp.any(params["a"][:, order[:3]]))
        small = jc.nodes(params, state)  # the filters of the last cut, wherever training stands
        assert int(small["a"].mask.sum()) == 3
        assert bool((jc.materialize(small)["a"] == jnp.where(small["a"].mask, params["a"], 0)).all())
    assert counts == [3, 0, 0, 3, 0, 0]


def test_zero_filters_receive_gradients_and_can_return(params, groups, rng):
    x = jnp.asarray(rng.normal(size=(32, 4)), jnp.float32)
    tx = structured.soft_filter(groups, sparsity=0.5)
    params["bias"] = jnp.abs(params["bias"])
    cut, state = stepped(tx, params, zeros(params))
    dead = jnp.all(cut["a"] == 0, axis=0)
    assert int(dead.sum()) == 3
    grad = jax.grad(lambda p: jnp.sum(mlp(p, x)[:, 0]))(cut)
    assert bool(jnp.all(jnp.any(grad["a"][:, dead] != 0, axis=0)))
    # Where the loss wants a dead filter large, it takes the place of another.
    first = int(jnp.argmax(dead))
    push = zeros(params) | {"a": zeros(params)["a"].at[:, first].set(100.0)}
    back, _ = stepped(tx, cut, push, state)
    assert bool(jnp.all(back["a"][:, first] == 100))
    assert int(jnp.all(back["a"] == 0, axis=0).sum()) == 3


def test_soft_filters_run_under_jit_with_a_ramp(params, groups):
    ramp = optax.linear_schedule(0.0, 0.5, 2)
    tx = optax.chain(optax.sgd(0.0), structured.soft_filter(groups, ramp))
    step = jax.jit(lambda p, state: stepped(tx, p, zeros(p), state))
    state, counts = tx.init(params), []
    for _ in range(3):
        params, state = step(params, state)
        counts.append(int(jnp.all(params["a"] == 0, axis=0).sum()))
    assert counts == [0, 2, 3]
    assert step._cache_size() == 1


def test_transforms_want_the_parameters_of_their_groups(params, groups):
    tx = structured.soft_filter(groups, 0.5)
    with pytest.raises(ValueError, match=r"soft_filter needs the parameters: call tx.update\(grads, state, params\)"):
        tx.update(zeros(params), tx.init(params), None)
    with pytest.raises(ValueError, match=r"every=0 must be a positive"):
        structured.soft_filter(groups, 0.5, every=0)
    with pytest.raises(ValueError, match=r"hidden: keep: sparsity=1.5 is outside"):
        stepped(structured.soft_filter(groups, 1.5), params, zeros(params))
    other = {"params": params}
    with pytest.raises(ValueError, match=r"a: the group 'hidden' names it, but the parameters do not hold it"):
        stepped(tx, other, zeros(other))


def test_half_precision_stays(params, groups):
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    for tx in (structured.soft_filter(groups, 0.5), structured.group_lasso_proximal(groups, 0.5)):
        new, _ = stepped(tx, params, zeros(params))
        assert new["a"].dtype == jnp.bfloat16


def test_sharded_parameters_stay_where_they_are(params, groups):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))
    spec = {"a": ("d", None), "bias": ("d",), "b": (None, "d")}
    placed = {
        name: jax.device_put(w, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec[name])))
        for name, w in params.items()
    }
    for tx in (structured.soft_filter(groups, 0.5), structured.group_lasso_proximal(groups, 0.5)):
        new, _ = jax.jit(lambda p, tx=tx: stepped(tx, p, zeros(p)))(placed)
        expected, _ = stepped(tx, params, zeros(params))
        for name, w in new.items():
            assert w.sharding.is_equivalent_to(placed[name].sharding, w.ndim)
            np.testing.assert_allclose(w, expected[name], rtol=1e-5)
