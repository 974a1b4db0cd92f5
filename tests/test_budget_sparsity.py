"""Sparsities of leaves under one budget: exact totals, published densities, and optima found by brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from jcompress.budget import by_sensitivity, erdos_renyi, erk, global_, lamp, scan, uniform
from jcompress.prune import NM, Block, ByScore, Magnitude, scores

SHAPES = {"conv": (3, 3, 4, 8), "wide": (37, 41), "narrow": (11, 5), "bias": (7,)}
LOSSES = {0.0: 0.0, 0.5: 1.0, 0.9: 4.0, 1.0: 9.0}


@pytest.fixture
def params(rng):
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def planned(params, method=Magnitude(sparsity=0), pattern=".*"):
    return jc.plan(params, [(pattern, method)])


BUDGETS = {
    "uniform": lambda plan, params, s, **k: uniform(plan, s, **k),
    "erdos_renyi": lambda plan, params, s, **k: erdos_renyi(plan, s, **k),
    "erk": lambda plan, params, s, **k: erk(plan, s, **k),
    "global_": lambda plan, params, s, **k: global_(plan, jax.tree.map(jnp.abs, params), s, **k),
    "lamp": lambda plan, params, s, **k: lamp(plan, params, s, **k),
    "by_sensitivity": lambda plan, params, s, **k: by_sensitivity(plan, dict.fromkeys(params, LOSSES), s, **k),
}
every_budget = pytest.mark.parametrize("name", BUDGETS)


def zeros(params, plan):
    small = jc.compress(params, plan)
    return {k: int((~x.mask).sum()) if isinstance(x, jc.formats.Masked) else 0 for k, x in small.items()}


@every_budget
@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.8, 0.987, 1.0])
def test_the_total_is_exact(name, sparsity, params):
    plan = BUDGETS[name](planned(params), params, sparsity)
    total = sum(x.size for x in params.values())
    assert sum(zeros(params, plan).values()) == round(sparsity * total)
    assert all(0 <= method.sparsity <= 1 for method in plan.values())


@every_budget
def test_leaves_kept_dense_count_and_others_pay(name, params):
    plan = BUDGETS[name](planned(params), params, 0.8, dense=("bias", "conv"))
    assert plan["bias"] is None and plan["conv"] is None
    total = sum(x.size for x in params.values())
    assert sum(zeros(params, plan).values()) == round(0.8 * total)
    aside = BUDGETS[name](jc.plan(params, [("bias|conv", None), (".*", Magnitude(0.1))]), params, 0.8)
    assert sum(zeros(params, aside).values()) == round(0.8 * (37 * 41 + 55))


def test_uniform_differs_by_less_than_one_weight(params):
    for name, n in zeros(params, uniform(planned(params), 0.37)).items():
        assert abs(n - 0.37 * params[name].size) < 1


@pytest.mark.parametrize(("budget", "axes"), [(erdos_renyi, lambda s: s[-2:]), (erk, lambda s: s)])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
def test_erdos_renyi_densities_are_proportional_but_for_dense_layers(budget, axes, sparsity, params):
    plan = budget(planned(params), sparsity)
    raw = {k: sum(axes(x.shape)) / np.prod(axes(x.shape)) for k, x in params.items()}
    density = {k: 1 - plan[k].sparsity for k in params}
    scale = max(density[k] / raw[k] for k in params)
    for name, x in params.items():
        want = min(1.0, scale * raw[name])
        assert abs(density[name] - want) * x.size < 3 + 0.02 * x.size


def test_erk_is_the_published_epsilon_search():
    """The reference: raise epsilon until no layer that is not dense passes one."""
    shapes = {"a": (784, 300), "b": (300, 100), "c": (100, 10)}
    sizes = {k: float(np.prod(s)) for k, s in shapes.items()}
    dense = set()
    while True:
        budget = 0.1 * sum(sizes.values()) - sum(sizes[k] for k in dense)
        raw = {k: sum(s) / np.prod(s) for k, s in shapes.items() if k not in dense}
        epsilon = budget / sum(raw[k] * sizes[k] for k in raw)
        if max(raw.values()) * epsilon <= 1:
            break
        dense.add(max(raw, key=raw.get))
    shaped = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    plan = erk(planned(shaped), 0.9)
    for name in shapes:
        want = 1.0 if name in dense else raw[name] * epsilon
        assert abs(1 - plan[name].sparsity - want) <= 1 / sizes[name] + 1e-9


def test_global_and_lamp_give_the_masks_of_one_threshold(params):
    total = sum(x.size for x in params.values())
    for plan, score in (
        (global_(planned(params), jax.tree.map(jnp.abs, params), 0.9), scores.magnitude),
        (lamp(planned(params), params, 0.9), scores.layer_adaptive),
    ):
        by_plan = jc.compress(params, plan)
        at_once = jc.compress(params, planned(params, ByScore(0.9, "global", score=score)))
        for name in params:
            np.testing.assert_array_equal(by_plan[name].mask, at_once[name].mask)
        assert sum(int(x.mask.sum()) for x in by_plan.values()) == total - round(0.9 * total)


def test_lamp_empties_no_leaf(params):
    scaled = {k: x * 10.0 ** (3 * i) for i, (k, x) in enumerate(params.items())}
    plan = lamp(planned(scaled), scaled, 1 - 4 / sum(x.size for x in params.values()))
    assert all(round((1 - plan[k].sparsity) * x.size) == 1 for k, x in params.items())


def test_by_sensitivity_is_the_optimum_of_convex_losses(rng):
    params = {name: jnp.ones((2, 3)) for name in "abc"}
    losses = {
        k: dict(zip(np.arange(7) / 6, np.cumsum(np.r_[0, np.sort(rng.uniform(size=6))]), strict=True)) for k in "abc"
    }
    for cut in (0, 5, 9, 14, 18):
        plan = by_sensitivity(planned(params), losses, cut / 18)
        counts = [round(plan[k].sparsity * 6) for k in "abc"]
        cost = sum(losses[k][n / 6] for k, n in zip("abc", counts, strict=True))
        best = min(
            sum(losses[k][n / 6] for k, n in zip("abc", ns, strict=True))
            for ns in itertools.product(range(7), repeat=3)
            if sum(ns) == cut
        )
        assert sum(counts) == cut
        assert cost == pytest.approx(best, rel=1e-9)


def test_by_sensitivity_takes_the_convex_curve_under_a_bump_and_its_limits():
    params = {"a": jnp.ones(10), "b": jnp.ones(10)}
    bumped = {"a": {0.0: 0.0, 0.5: 50.0, 1.0: 2.0}, "b": {0.0: 0.0, 0.5: 3.0, 0.8: 100.0}}
    plan = by_sensitivity(planned(params), bumped, 0.5)
    assert [method.sparsity for method in plan.values()] == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"the budget cuts 19 weights beyond .* of 18 up to the largest"):
        by_sensitivity(planned(params), bumped, 0.95)
    for losses in ({"a": LOSSES}, {"a": LOSSES, "b": {0.0: 0.0}}, {"a": LOSSES, "b": {0.0: 0.0, 1.0: np.nan}}):
        with pytest.raises(ValueError, match="b: by_sensitivity needs finite losses at two sparsities"):
            by_sensitivity(planned(params), losses, 0.5)


def test_a_scan_prunes_one_leaf_at_a_time(params):
    seen = []

    def evaluate(plan):
        seen.append({path for path, method in plan.items() if method is not None})
        return sum(zeros(params, plan).values())

    found = scan(evaluate, jc.plan(params, [("bias", None), (".*", Magnitude(0.1))]), (0.0, 0.5))
    assert found == {k: {0.0: 0, 0.5: round(x.size / 2)} for k, x in params.items() if k != "bias"}
    assert all(len(paths) == 1 for paths in seen)
    with pytest.raises(ValueError, match=r"scan: sparsity=2 is outside"):
        scan(evaluate, planned(params), (2,))


def test_methods_made_of_others_and_scopes(params):
    del params["bias"]
    method = jc.chain(Magnitude(0.1, scope="global"), jc.quantize.Int(bits=4))
    plan = uniform(planned(params, method), 0.5)
    assert repr(plan["wide"]).startswith("chain(Magnitude(sparsity=0.5")
    small = jc.compress(params, plan)
    total = sum(x.size for x in params.values())
    assert sum(int((~x.mask).sum()) for x in small.values()) == round(0.5 * total)
    stack = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 4)), jnp.float32)}
    plan = uniform(planned(stack, jc.stacked(Magnitude(0.1))), 0.72)
    assert int((~jc.compress(stack, plan)["w"].mask).sum()) == 45  # a multiple of the layers, the nearest above 43.2


def test_blocks_and_outputs_are_counted_whole(params):
    two = {k: params[k] for k in ("conv", "wide")}
    plan = uniform(planned(two, Magnitude(0.1, pattern=Block((None, 1)))), 0.5)
    small = jc.compress(two, plan)
    assert int(small["wide"].mask.any(0).sum()) == 20 and int(small["wide"].mask.sum()) == 20 * 37
    plan = erk(planned(two, Magnitude(0.1, scope="output")), 0.5)
    kept = {k: np.asarray(jc.compress(two, plan)[k].mask).reshape(-1, x.shape[-1]).sum(0) for k, x in two.items()}
    assert all((n == n[0]).all() for n in kept.values())
    assert abs(sum(n.sum() for n in kept.values()) - 0.5 * sum(x.size for x in two.values())) <= 41


def test_errors_say_what_to_do(params):
    with pytest.raises(ValueError, match=r"erk: sparsity=1.2 is outside \[0, 1\]"):
        erk(planned(params), 1.2)
    with pytest.raises(ValueError, match="uniform: dense='head' matches none of the planned paths"):
        uniform(planned(params), 0.5, dense="head")
    with pytest.raises(ValueError, match=r"keeps 187 of 1867 weights, and 1517 are kept dense; lower it, or keep less"):
        uniform(planned(params), 0.9, dense="wide")
    with pytest.raises(ValueError, match=r"wide: uniform sets a sparsity, and Int\(bits=4\) has none; keep it out"):
        uniform(planned(params, jc.quantize.Int(bits=4), "wide"), 0.5)
    with pytest.raises(ValueError, match=r"conv: .* has its sparsity fixed by the pattern"):
        uniform(planned(params, Magnitude(pattern=NM(2, 4)), "conv"), 0.5)
    with pytest.raises(ValueError, match="the plan compresses nothing"):
        uniform(jc.plan(params, [(".*", None)]), 0.5)
    with pytest.raises(ValueError, match=r"wide: lamp needs an array of shape \(37, 41\), found shape \(2,\)"):
        lamp(planned(params), {**params, "wide": jnp.ones(2)}, 0.5)
    with pytest.raises(ValueError, match=r"global_ needs an array of shape .* found none"):
        global_(planned(params), {}, 0.5)
    with pytest.raises(ValueError, match="the plan does not know the shape"):
        uniform(jc.Plan({"w": Magnitude(0.5)}), 0.5)
