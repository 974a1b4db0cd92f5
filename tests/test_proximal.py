"""Proximal operators and the descent that uses them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.isotonic import IsotonicRegression
from test_conformance import collectives

import jcompress as jc
from jcompress.numeric import shrinkage
from jcompress.prune import penalties, structured

PENALTIES = {
    "l1": penalties.L1(0.7),
    "elastic net": penalties.ElasticNet(0.5, 0.8),
    "rows": penalties.GroupLasso(0.9),
    "columns, weighted": penalties.GroupLasso(0.4, axes=(-2,), weighted=True),
    "all": penalties.GroupLasso(1.1, axes=(-2, -1)),
    "nuclear": penalties.NuclearNorm(0.4),
    "growl": penalties.GrOWL(0.3, 0.25),
    "growl, columns": penalties.GrOWL(0.3, 0.25, axis=-1),
}


@pytest.fixture
def lasso(rng):
    x = rng.normal(size=(40, 12)) @ np.diag(np.linspace(0.1, 2, 12))
    w = np.where(np.arange(12) % 3 == 0, 2.0, 0.0)
    return jnp.asarray(x, jnp.float32), jnp.asarray(x @ w + 0.01 * rng.normal(size=40), jnp.float32)


@pytest.mark.parametrize("name", PENALTIES)
def test_the_operator_gives_the_minimum(name, rng):
    """The objective is convex, so a point that no nearby point beats, at any distance, is its minimum."""
    penalty, step = PENALTIES[name], 0.8
    scale = np.outer([0.1, 1, 1.5, 1], [1, 0.1, 1])
    x = jnp.asarray(scale * rng.normal(size=(4, 3)), jnp.float32)

    def objective(v):
        return 0.5 * jnp.sum((v - x) ** 2) + step * penalty(v)

    found = penalty.prox(x, step)
    scales = np.geomspace(1e-3, 2, 6000)[:, None, None]
    near = found + jnp.asarray(scales * rng.normal(size=(6000, 4, 3)), jnp.float32)
    # Along axes as well: there a penalty has its kinks.
    one = jnp.asarray(scales * np.eye(12).reshape(12, 4, 3)[rng.integers(0, 12, 6000)], jnp.float32)
    others = jnp.concatenate([near, found + one, found - one, x + 0 * near[:1], 0 * near[:1]])
    assert float(objective(found)) <= float(jax.vmap(objective)(others).min()) + 1e-6
    assert bool((found == 0).any()) or name in ("all", "nuclear")


def test_soft_thresholding_is_the_minimum_on_a_grid():
    grid = np.linspace(-3, 3, 60_001)
    for w in (-2.3, -0.4, 0.0, 0.69, 1.7):
        exact = grid[np.argmin(0.5 * (grid - w) ** 2 + 0.7 * abs(grid))]
        assert abs(float(shrinkage.soft_threshold(jnp.array(w), 0.7)) - exact) < 1e-4


# GrOWL.


@pytest.mark.parametrize("seed", range(4))
def test_pooling_adjacent_violators_is_isotonic_regression(seed):
    x = np.random.default_rng(seed).normal(size=50).round(1)
    exact = IsotonicRegression(increasing=False).fit_transform(np.arange(50), x)
    np.testing.assert_allclose(jax.jit(shrinkage.isotonic)(jnp.asarray(x, jnp.float32)), exact, atol=1e-5)


def test_pooling_works_under_vmap_and_on_nothing(rng):
    xs = jnp.asarray(rng.normal(size=(3, 9)), jnp.float32)
    together = jax.vmap(shrinkage.isotonic)(xs)
    np.testing.assert_allclose(together, jnp.stack([shrinkage.isotonic(x) for x in xs]), atol=1e-6)
    assert shrinkage.isotonic(jnp.zeros(0)).shape == (0,)


def test_growl_without_slope_is_the_group_lasso(rng):
    x = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    lasso = penalties.GroupLasso(0.8)
    np.testing.assert_allclose(penalties.GrOWL(0.8, 0.0).prox(x, 1.5), lasso.prox(x, 1.5), atol=1e-6)
    np.testing.assert_allclose(penalties.GrOWL(0.8, 0.0)(x), lasso(x), rtol=1e-6)


def test_rows_of_norms_near_each_other_become_equal():
    rows = jnp.array([[3.0, 4.0], [4.8, 0.0], [0.0, 5.2], [0.1, 0.0], [20.0, 0.0]])
    found = np.linalg.norm(penalties.GrOWL(0.2, 0.4).prox(rows, 1.0), axis=1)
    np.testing.assert_allclose(found[:3], found[0], rtol=1e-6)
    assert found[3] == 0
    assert found[4] > found[0] > 0


# Groups.


def test_groups_of_one_array_shrink_as_coupled_groups_do(rng):
    params = {"kernel": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)}
    group = {"hidden": jc.trace.Group(size=6, producers=(("kernel", 1),))}
    still = jax.tree.map(jnp.zeros_like, params)
    tx = structured.group_lasso_proximal(group, 0.5 * 3.0)
    expected, _ = tx.update(still, tx.init(params), params)
    tx = penalties.proximal(penalties.GroupLasso(3.0, axes=(-2,)), 0.5)
    found, _ = tx.update(still, tx.init(params), params)
    np.testing.assert_allclose(found["kernel"], expected["kernel"], atol=1e-6)
    value = penalties.GroupLasso(1.0, axes=(-2,))(params["kernel"])
    np.testing.assert_allclose(value, structured.group_lasso(params, group), rtol=1e-6)


def test_the_gradient_at_a_group_of_zeros_is_zero():
    gradient = jax.grad(penalties.GroupLasso(1.0))(jnp.array([[0.0, 0.0], [3.0, 4.0]]))
    np.testing.assert_allclose(gradient, [[0, 0], [0.6, 0.8]], atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_growl_gathers_norms_and_leaves_the_array_where_it_is(axis, rng):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(*["model" if i == axis else None for i in range(2)])
    w = jax.device_put(jnp.asarray(rng.normal(size=(16, 64)), jnp.float32), jax.sharding.NamedSharding(mesh, spec))
    prox = jax.jit(lambda w: penalties.GrOWL(0.1, 0.1).prox(w, 1.0))
    sizes = [size for _, size in collectives(prox.lower(w).compile().as_text())]
    assert max(sizes) <= 16
    found = prox(w)
    assert found.sharding.is_equivalent_to(w.sharding, 2)
    np.testing.assert_allclose(found, penalties.GrOWL(0.1, 0.1).prox(jax.device_get(w), 1.0), atol=1e-6)


# Descent.


def descend(tx, x, y, strength, steps, read):
    def loss(p):
        return 0.5 * jnp.sum((x @ p["w"] - y) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        w = read(params, state)["w"]
        return (params, state), (loss({"w": w}) + strength * jnp.abs(w).sum(), w)

    params = {"w": jnp.zeros(x.shape[1])}
    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), None, steps)[1])()


def test_an_orthonormal_design_has_the_closed_form(rng):
    x = jnp.asarray(np.linalg.qr(rng.normal(size=(20, 6)))[0], jnp.float32)
    y = jnp.asarray(rng.normal(size=20), jnp.float32)
    tx = optax.chain(optax.sgd(1.0), penalties.proximal(penalties.L1(0.3), 1.0))
    _, ws = descend(tx, x, y, 0.3, 3, lambda params, state: params)
    exact = shrinkage.soft_threshold(x.T @ y, 0.3)
    np.testing.assert_allclose(ws[-1], exact, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(ws[-1]) == 0, np.asarray(exact) == 0)


def test_the_objective_falls_at_every_step_and_faster_with_momentum(lasso):
    x, y = lasso
    rate, strength = 1 / float(jnp.linalg.norm(x, 2) ** 2), 0.5
    plain = optax.chain(optax.sgd(rate), penalties.proximal(penalties.L1(strength), rate))
    quick = penalties.accelerated(penalties.L1(strength), rate)
    slow, _ = descend(plain, x, y, strength, 400, lambda params, state: params)
    fast, ws = descend(quick, x, y, strength, 400, lambda params, state: state.iterate)
    assert bool((jnp.diff(slow) <= 1e-4).all())
    best = float(jnp.minimum(slow.min(), fast.min()))
    # The bound of Beck & Teboulle, 2 |x0 - x*|^2 / (rate (k + 1)^2), holds for every k.
    k = np.arange(1, 401)
    bound = 2 * float(jnp.sum(ws[-1] ** 2)) / (rate * (k + 1) ** 2)
    assert (np.asarray(fast) - best <= bound + 1e-3).all()
    for steps in (50, 100, 200):
        assert float(fast[steps]) - best < 0.5 * (float(slow[steps]) - best)
    assert 0 < int((ws[-1] == 0).sum()) < 12


def test_any_optimizer_and_schedule_and_exact_zeros(rng):
    params = {"a": jnp.asarray(rng.normal(size=(6, 4)), jnp.bfloat16), "bias": jnp.full(4, 0.01)}
    rate = optax.linear_schedule(0.1, 0.0, 3)
    tx = optax.chain(optax.adamw(rate), penalties.proximal(penalties.L1(3.0), rate, match="a"))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state

    counts = []
    for _ in range(5):
        params, state = step(params, state)
        counts.append(int((params["a"] == 0).sum()))
    assert counts == sorted(counts)
    assert 0 < counts[2] == counts[4]
    assert params["a"].dtype == jnp.bfloat16
    assert not bool((params["bias"] == 0).any())


def test_what_cannot_be_done_is_refused_by_name():
    params = {"layer": {"bias": jnp.ones(3)}}
    with pytest.raises(ValueError, match=r"layer/bias: found shape \(3,\), which has no axes \[-2\] .* match="):
        tx = penalties.proximal(penalties.GroupLasso(1.0, axes=(-2,)), 0.1)
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="proximal: match: 'kernel' matches no parameter"):
        tx = penalties.proximal(penalties.L1(1.0), 0.1, match="kernel")
        tx.update(params, tx.init(params), params)
    tx = penalties.accelerated(penalties.L1(1.0), 0.1)
    with pytest.raises(ValueError, match="accelerated needs the parameters"):
        tx.update(params, tx.init(params))


def test_the_nuclear_norm_thresholds_singular_values():
    """The minimum over matrices is known: the same singular vectors, their values moved by the limit."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 3, 2, 7)), jnp.float32)
    u, s, v = np.linalg.svd(np.asarray(x, np.float64).reshape(18, 7), full_matrices=False)
    found = penalties.NuclearNorm(2.0).prox(x, 1.5)
    np.testing.assert_allclose(found.reshape(18, 7), (u * np.maximum(s - 3.0, 0)) @ v, atol=1e-5)
    np.testing.assert_allclose(penalties.NuclearNorm(2.0)(x), 2 * s.sum(), rtol=1e-5)
    stacked = jnp.stack([x.reshape(18, 7), 2 * x.reshape(18, 7)])
    apart = penalties.NuclearNorm(2.0, ndim=2).prox(stacked, 1.5)
    np.testing.assert_allclose(apart[0], found.reshape(18, 7), atol=1e-5)


def test_proximal_steps_of_the_nuclear_norm_find_a_planted_rank():
    rng = np.random.default_rng(1)
    target = jnp.asarray(rng.normal(size=(20, 3)) @ rng.normal(size=(3, 15)), jnp.float32)
    noisy = target + 0.05 * jnp.asarray(rng.normal(size=target.shape), jnp.float32)
    params = {"w": jnp.zeros_like(target)}
    tx = optax.chain(optax.sgd(0.5), penalties.proximal(penalties.NuclearNorm(1.0), 0.5))
    state = tx.init(params)
    for _ in range(30):
        updates, state = tx.update({"w": params["w"] - noisy}, state, params)
        params = optax.apply_updates(params, updates)
    s = np.linalg.svd(params["w"], compute_uv=False)
    assert s[2] > 1 and s[3] < 1e-4
    # The minimum in closed form.
    np.testing.assert_allclose(params["w"], penalties.NuclearNorm(1.0).prox(noisy, 1.0), atol=1e-3)
    with pytest.raises(ValueError, match="w: found shape"):
        tx.update({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}), {"w": jnp.ones(3)})
