"""NetAdapt: greedy equals exhaustive where parts are separable, and the budget is met."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc
from jcompress.prune import structured


def mlp(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]


@pytest.fixture
def model(rng):
    shapes = {"a": (3, 6), "b": (6, 5), "c": (5, 2)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(40, 3)), jnp.float32)
    return params, jc.trace.coupling(mlp, params, x), x


def by_l2(groups):
    return lambda p: structured.l2(p, groups)


def test_greedy_is_exhaustive_on_a_separable_toy(rng):
    # Two branches that are added: the loss of what is cut and its price are both sums over units.
    worth = {"a[1]": rng.permutation(np.arange(1.0, 5)), "b[1]": rng.permutation(np.arange(1.0, 6)) * 0.9}
    params = {"a": jnp.ones((2, 4)), "c": jnp.ones((4, 3)), "b": jnp.ones((2, 5)), "d": jnp.ones((5, 3))}
    groups = jc.trace.coupling(lambda p, x: x @ p["a"] @ p["c"] + x @ p["b"] @ p["d"], params, jnp.ones((7, 2)))
    units = {"a[1]": "a", "b[1]": "b"}

    def score(p):
        return sum(float(np.dot(worth[name], np.asarray(p[path][0] != 0))) for name, path in units.items())

    count = jc.budget.parameter_count(params, groups)
    for budget in (44, 25, 10):
        found = jc.budget.netadapt(
            params, groups, budget=budget, step=5, cost=count, importance=lambda p: worth, score=score
        )
        best = -np.inf
        for bits in itertools.product([False, True], repeat=9):
            keep = {"a[1]": np.array(bits[:4]), "b[1]": np.array(bits[4:])}
            if keep["a[1]"].any() and keep["b[1]"].any() and count(keep) <= budget:
                best = max(best, sum(float(worth[name][kept].sum()) for name, kept in keep.items()))
        assert found.cost <= budget
        assert score(found.params) == pytest.approx(best)


@pytest.mark.parametrize("kind", ["multiply-adds", "parameters"])
def test_cost_falls_by_the_step_and_ends_within_the_budget(model, kind):
    params, groups, x = model
    cost = (
        jc.trace.coupling(mlp, params, x).multiply_adds
        if kind == "multiply-adds"
        else jc.budget.parameter_count(params, groups)
    )
    full, target = cost({}), mlp(params, x)
    found = jc.budget.netadapt(
        params,
        groups,
        budget=0.4 * full,
        step=0.15 * full,
        cost=cost,
        importance=by_l2(groups),
        score=lambda p: -jnp.mean(jnp.square(mlp(p, x) - target)),
    )
    costs = [full, *(r.cost for r in found.history)]
    for before, r in zip(costs, found.history, strict=False):
        assert r.cost <= r.target == max(before - 0.15 * full, 0.4 * full)
    assert found.cost == costs[-1] <= 0.4 * full
    assert found.cost == cost(found.keep)
    small_fn, small = jc.shrink(mlp, found.params, found.keep, x)
    np.testing.assert_allclose(small_fn(small, x), mlp(found.params, x), atol=1e-5)
    if kind == "multiply-adds":
        assert jc.trace.cost(small_fn, small, x).total.multiply_adds == found.cost
    else:
        assert sum(v.size for v in small.values()) == found.cost


def test_each_round_takes_the_best_of_what_groups_propose(model):
    params, groups, x = model
    target, score = mlp(params, x), lambda p: -jnp.mean(jnp.square(mlp(p, x) - target))
    count = jc.budget.parameter_count(params, groups)
    found = jc.budget.netadapt(
        params, groups, budget=count({}) - 1, step=20, cost=count, importance=by_l2(groups), score=score
    )
    ranks, proposals = structured.l2(params, groups), {}
    for name, unit in (("a[1]", 3 + 5), ("b[1]", 6 + 2)):
        kept = np.ones(groups[name].size, bool)
        kept[np.argsort(ranks[name])[: -(-1 // unit)]] = False
        proposals[name] = float(score(jc.trace.mask(params, groups, {name: kept})))
    assert dict(found.history[0].proposals) == pytest.approx(proposals, rel=1e-5)
    assert found.history[0].group == max(proposals, key=proposals.get)
    assert len(found.history) == 1


def test_a_proposal_cuts_as_few_units_as_reach_the_step(model):
    params, groups, _ = model
    count = jc.budget.parameter_count(params, groups)
    found = jc.budget.netadapt(
        params, groups, budget=count({}) - 17, step=17, cost=count, importance=lambda p: {"a[1]": jnp.arange(6.0)},
        score=lambda p: 0.0,
    )  # fmt: skip
    assert found.keep["a[1]"].tolist() == [False, False, False, True, True, True]


def test_fine_tuning_trains_and_cut_units_stay_zero(model):
    params, groups, x = model
    target, tx = mlp(params, x), optax.sgd(0.05)
    loss = jax.jit(lambda p: jnp.mean(jnp.square(mlp(p, x) - target)))
    step = jax.jit(lambda p: optax.apply_updates(p, tx.update(jax.grad(loss)(p), tx.init(p))[0]))

    def finetune(p, keep):
        for _ in range(20):
            p = step(p)
        return jax.tree.map(lambda w: w + 1e-3, p)

    plain, tuned = (
        jc.budget.netadapt(
            params, groups, budget=40, step=10, cost=jc.budget.parameter_count(params, groups),
            importance=by_l2(groups), score=lambda p: -loss(p), finetune=f,
        )
        for f in (None, finetune)
    )  # fmt: skip
    assert loss(tuned.params) < loss(plain.params)
    masked = jc.trace.mask(tuned.params, groups, tuned.keep)
    jax.tree.map(np.testing.assert_array_equal, masked, tuned.params)
    assert "round" in str(tuned)


def test_sizes_are_multiples_and_the_least_stays():
    params = {"a": jnp.ones((2, 32)), "b": jnp.ones((32, 16)), "c": jnp.ones((16, 2))}
    groups = jc.trace.coupling(mlp, params, jnp.ones((3, 2)))
    found = jc.budget.netadapt(
        params, groups, budget=300, step=100, cost=jc.budget.parameter_count(params, groups), importance=by_l2(groups),
        score=lambda p: 0.0, multiple_of=8, at_least=8, decay=0.9,
    )  # fmt: skip
    assert all(int(kept.sum()) % 8 == 0 and kept.sum() >= 8 for kept in found.keep.values())


def test_a_measured_latency_is_a_cost_like_any_other(model):
    params, groups, x = model
    sizes = []

    def latency(keep):
        _, small = jc.shrink(mlp, params, keep, x) if keep else (mlp, params)
        sizes.append(small["a"].shape[1])
        return small["a"].shape[1] * 1e-3

    found = jc.budget.netadapt(
        params, groups, budget=2.5e-3, step=1e-3, cost=latency, importance=lambda p: {"a[1]": jnp.arange(6.0)},
        score=lambda p: 0.0,
    )  # fmt: skip
    assert found.keep["a[1]"].tolist() == [False] * 4 + [True] * 2
    assert min(sizes) == 1


def test_errors_name_what_is_wrong(model):
    params, groups, _ = model
    count = jc.budget.parameter_count(params, groups)
    common = {"cost": count, "importance": by_l2(groups), "score": lambda p: 0.0}
    with pytest.raises(ValueError, match=r"budget 3 cannot be met: the cost is 6\.0"):
        jc.budget.netadapt(params, groups, budget=3, step=5, **common)
    with pytest.raises(ValueError, match="step=0"):
        jc.budget.netadapt(params, groups, budget=30, step=0, **common)
    with pytest.raises(ValueError, match="decay=2"):
        jc.budget.netadapt(params, groups, budget=30, step=1, decay=2, **common)
    with pytest.raises(ValueError, match="at_least=0"):
        jc.budget.netadapt(params, groups, budget=30, step=1, at_least=0, **common)
    with pytest.raises(ValueError, match="round 0: the score of every proposal is NaN"):
        jc.budget.netadapt(params, groups, budget=30, step=5, **(common | {"score": lambda p: np.nan}))
    with pytest.raises(ValueError, match=r"a\[1\]: netadapt found importance of shape \(2,\); expected \(6,\)"):
        jc.budget.netadapt(
            params, groups, budget=30, step=5, **(common | {"importance": lambda p: {"a[1]": jnp.ones(2)}})
        )
