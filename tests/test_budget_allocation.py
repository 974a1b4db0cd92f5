"""Plans mixed under a budget: against brute force, an integer program, eigenvalues by NumPy, and closed forms."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

import jcompress as jc
from jcompress.budget.allocation import choose

Int = jc.quantize.Int

tables = st.lists(
    st.lists(st.tuples(st.integers(0, 40), st.floats(-3, 10)), min_size=1, max_size=4), min_size=1, max_size=5
)


def separated(table):
    return [[c for c, _ in row] for row in table], [[e for _, e in row] for row in table]


def totals(costs, errors, picked):
    return (
        sum(row[i] for row, i in zip(costs, picked, strict=True)),
        math.fsum(row[i] for row, i in zip(errors, picked, strict=True)),
    )


@given(tables, st.integers(0, 200))
@settings(deadline=None, max_examples=200)
def test_the_choice_is_that_of_brute_force(table, budget):
    costs, errors = separated(table)
    every = [totals(costs, errors, p) for p in itertools.product(*(range(len(row)) for row in costs))]
    paid = [e for c, e in every if c <= budget]
    if not paid:
        with pytest.raises(ValueError, match=f"cost {min(c for c, _ in every)} together"):
            choose(costs, errors, budget)
        return
    cost, error = totals(costs, errors, choose(costs, errors, budget))
    assert cost <= budget
    assert error == pytest.approx(min(paid), abs=1e-6)


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_no_uniform_plan_is_better_at_equal_cost(seed):
    rng = np.random.default_rng(seed)
    n, k = rng.integers(1, 30), rng.integers(2, 6)
    sizes = rng.integers(1, 100_000, size=n)
    bits = np.arange(2, 2 + k)
    costs = [[int(s * b) for b in bits] for s in sizes]
    errors = [list(rng.gamma(1.0) * s * 4.0**-bits * rng.uniform(0.5, 2, size=k)) for s in sizes]
    for i in range(k):
        budget, uniform = totals(costs, errors, [i] * n)
        cost, error = totals(costs, errors, choose(costs, errors, budget))
        assert cost <= budget and error <= uniform * (1 + 1e-9)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_large_choice_is_that_of_an_integer_program(part):
    rng = np.random.default_rng(3)
    sizes = rng.integers(100, 1000, size=40)
    costs = [[int(s * b) for b in (2, 3, 4, 6, 8)] for s in sizes]
    errors = [[float(g * s * 4.0**-b * u) for b, u in zip((2, 3, 4, 6, 8), rng.uniform(0.5, 2, 5), strict=True)]
              for s, g in zip(sizes, rng.gamma(0.5, size=40), strict=True)]  # fmt: skip
    low, high = sum(map(min, costs)), sum(map(max, costs))
    budget = int(low + part * (high - low))
    one = np.kron(np.eye(40), np.ones(5))
    found = scipy.optimize.milp(
        np.ravel(errors), integrality=np.ones(200), bounds=scipy.optimize.Bounds(0, 1), options={"mip_rel_gap": 0},
        constraints=[scipy.optimize.LinearConstraint(one, 1, 1),
                     scipy.optimize.LinearConstraint(np.ravel(costs)[None], -np.inf, budget)],
    )  # fmt: skip
    cost, error = totals(costs, errors, choose(costs, errors, budget))
    assert cost <= budget
    assert error <= found.fun * (1 + 1e-6)
    assert error == pytest.approx(found.fun, rel=1e-4)


@pytest.fixture
def model(rng):
    params = {
        "first": {"kernel": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32), "bias": jnp.ones(16)},
        "second": {"kernel": jnp.asarray(0.1 * rng.normal(size=(16, 12)), jnp.float32)},
        "third": {"kernel": jnp.asarray(3 * rng.normal(size=(12, 4)), jnp.float32)},
    }
    x = jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)

    def fn(p, x):
        x = jnp.tanh(x @ p["first"]["kernel"] + p["first"]["bias"])
        return jnp.tanh(x @ p["second"]["kernel"]) @ p["third"]["kernel"]

    return fn, params, x


def plans_of(params):
    methods = {
        "2 bits": Int(bits=2), "4 bits": Int(bits=4), "8 bits": Int(bits=8), "rank 2": jc.factorize.SVD(rank=2),
        "dense": None,
    }  # fmt: skip
    return {name: jc.plan(params, [(".*kernel", method)]) for name, method in methods.items()}


@pytest.mark.parametrize("measure", ["output", "relative", "weight", "loss"])
def test_a_mixture_is_the_best_of_all_that_the_budget_pays(measure, model):
    fn, params, x = model
    plans = plans_of(params)
    target = fn(params, x) + 0.1
    stats = jc.calibrate(fn, params, [x])
    if measure == "loss":
        measure = jc.budget.loss_change(lambda p, x: jnp.square(fn(p, x) - target).mean(), params, x)
    found = jc.budget.options(params, plans, measure=measure, stats=stats)
    kernels = [path for path in found.costs if path.endswith("kernel")]
    dense = sum(found.costs[path]["dense"] for path in found.costs if path not in kernels)
    for part in (0.2, 0.3, 0.6):
        budget = int(part * jc.nbits(params))
        plan = jc.budget.mixed(params, plans, budget, measure=measure, stats=stats)
        spent = jc.nbits(jc.compress(params, plan, stats=stats))
        assert spent <= budget
        chosen = {p: next(n for n in plans if plans[n][p] == plan[p]) for p in kernels}
        ours = math.fsum(found.errors[p][n] for p, n in chosen.items())
        assert spent == dense + sum(found.costs[p][n] for p, n in chosen.items())
        best = min(
            math.fsum(found.errors[p][n] for p, n in zip(kernels, names, strict=True))
            for names in itertools.product(plans, repeat=len(kernels))
            if dense + sum(found.costs[p][n] for p, n in zip(kernels, names, strict=True)) <= budget
        )
        assert ours == pytest.approx(best, abs=1e-9)


def test_costs_are_the_bits_that_are_stored(model):
    _, params, _ = model
    plans = plans_of(params)
    found = jc.budget.options(params, plans, measure="weight")
    for name, plan in plans.items():
        assert sum(row[name] for row in found.costs.values()) == jc.nbits(jc.compress(params, plan))
    assert found.total(dict.fromkeys(found.costs, "dense")) == (0.0, jc.nbits(params))


def test_output_errors_are_those_of_the_outputs(model):
    fn, params, x = model
    plans = plans_of(params)
    stats = jc.calibrate(fn, params, [x])
    absolute, relative = (
        jc.budget.options(params, plans, measure=m, stats=stats).errors["first/kernel"] for m in ("output", "relative")
    )
    w = params["first"]["kernel"]
    value = jc.compress(params, plans["2 bits"])["first"]["kernel"].materialize()
    moved = np.square(np.asarray(x @ (value - w))).sum()
    assert absolute["2 bits"] == pytest.approx(moved, rel=1e-4)
    assert relative["2 bits"] == pytest.approx(moved / np.square(np.asarray(x @ w)).sum(), rel=1e-4)
    assert absolute["dense"] == 0


def test_bit_operations_are_a_budget_too(model):
    fn, params, x = model
    plans = plans_of(params)
    cost = jc.budget.bit_operations(fn, params, x)
    assert cost(params)["first/kernel"] == 32 * 8 * 16 * 32 * 32
    four = jc.compress(params, plans["4 bits"])
    assert cost(four)["first/kernel"] == 32 * 8 * 16 * 32 * 4
    budget = sum(cost(four).values())
    plan = jc.budget.mixed(params, plans, budget, measure="weight", cost=cost)
    assert sum(cost(jc.compress(params, plan)).values()) <= budget


def test_multiply_adds_are_a_budget_for_ranks_of_dense_layers_and_convolutions(rng):
    params = {
        "conv": jnp.asarray(rng.normal(size=(3, 3, 4, 6)), jnp.float32),
        "dense": jnp.asarray(rng.normal(size=(6, 10)), jnp.float32),
    }

    def fn(p, x):
        y = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y.mean((1, 2)) @ p["dense"]

    x = jnp.ones((1, 8, 8, 4))
    layout = jc.trace.layout(fn, params, x)
    plans = {f"rank {r}": jc.plan(params, [(".*", jc.factorize.SVD(rank=r))], layout=layout) for r in (1, 2, 3)}
    plans |= {"cp": jc.plan(params, [("conv", jc.factorize.CP(rank=5)), ("dense", None)], layout=layout)}
    plans |= {"codes": jc.plan(params, [(".*", jc.quantize.Int(bits=4))], layout=layout)}
    cost = jc.budget.multiply_adds(fn, params, x)
    assert cost(params) == cost(jc.compress(params, plans["codes"])) == {"conv": 64 * 3 * 3 * 4 * 6, "dense": 60}
    found = jc.budget.options(params, plans, measure="weight", cost=cost)
    assert found.costs["dense"]["rank 2"] == 2 * (6 + 10)
    assert found.costs["conv"]["cp"] == 64 * 5 * (3 + 3 + 4 + 6)
    budget = sum(cost(params).values()) // 2
    plan = jc.budget.mixed(params, plans, budget, measure="weight", cost=cost)
    chosen = jc.compress(params, plan)
    assert sum(cost(chosen).values()) <= budget
    even = [jc.compress(params, p) for name, p in plans.items() if name.startswith("rank")]
    within = [tree for tree in even if sum(cost(tree).values()) <= budget]

    def error(tree):
        return sum(float(jnp.sum((jc.materialize(tree)[p] - w) ** 2)) for p, w in params.items())

    assert within and all(error(chosen) <= error(tree) + 1e-4 for tree in within)


def test_eigenvalues_are_numpys(rng):
    a = rng.normal(size=(6, 6)).astype(np.float32)
    a = a + a.T + 4 * np.eye(6, dtype=np.float32)
    b = np.diag(np.array([1.0, -7.0, 3.0], np.float32))

    def loss(p, scale):
        return scale * (p["a"].ravel() @ a @ p["a"].ravel() / 2 + p["b"] @ b @ p["b"] / 2 + p["a"].sum() * p["b"].sum())

    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    found = jc.budget.top_eigenvalues(loss, params, 2.0, key=jax.random.key(0), steps=200)
    values = np.linalg.eigvalsh(2 * a)
    assert found["a"] == pytest.approx(values[np.argmax(np.abs(values))], rel=1e-3)
    assert found["b"] == pytest.approx(-14.0, rel=1e-3)


def test_hawq_gives_bits_to_the_leaf_that_is_curved(rng):
    w = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
    params, weights = {"flat": w, "sharp": w}, {"flat": 0.1, "sharp": 10.0}
    plans = {str(n): jc.plan(params, [(".*", Int(bits=n))]) for n in (2, 4, 8)}

    def loss(p):
        return sum(weights[name] * jnp.square(p[name] @ jnp.ones(8)).sum() for name in p)

    curvature = jc.budget.top_eigenvalues(loss, params, key=jax.random.key(1))
    assert curvature["sharp"] == pytest.approx(2 * 10.0 * 8, rel=1e-3)
    budget = jc.nbits(jc.compress(params, plans["4"])) + 2 * 64
    plan = jc.budget.mixed(params, plans, budget, measure=jc.budget.curvature_error(curvature))
    assert plan["sharp"].bits > plan["flat"].bits
    stats = jc.calibrate(
        lambda p, x: x @ p["flat"] + x @ p["sharp"],
        params,
        [jnp.ones((1, 8))],
        loss=lambda p, x: loss(p),
        statistics=("hessian_diagonal",),
        key=jax.random.key(2),
    )
    traced = jc.budget.mixed(params, plans, budget, measure="trace", stats=stats)
    assert traced["sharp"].bits > traced["flat"].bits


def test_errors_say_what_was_found(model):
    _, params, _ = model
    plans = plans_of(params)
    with pytest.raises(ValueError, match="cannot be met"):
        jc.budget.mixed(params, plans, 100, measure="weight")
    with pytest.raises(ValueError, match="needs stats"):
        jc.budget.mixed(params, plans, 10**6)
    with pytest.raises(ValueError, match="'size' is unknown"):
        jc.budget.mixed(params, plans, 10**6, measure="size")
    joint = {"all": jc.plan(params, [(".*kernel", jc.prune.Magnitude(sparsity=0.5, scope="global"))])}
    with pytest.raises(ValueError, match=r"first/kernel: .*several leaves at once"):
        jc.budget.mixed(params, joint, 10**6, measure="weight")
    other = {"one": jc.plan({"x": jnp.ones(3)}, [])}
    with pytest.raises(ValueError, match="other parameters"):
        jc.budget.mixed(params, other, 10**6, measure="weight")
    with pytest.raises(ValueError, match=r"first/bias: .*finite"):
        nan = {p: dict.fromkeys(plans, math.nan) for p in plans["dense"]}
        jc.budget.allocate(plans, nan, {p: dict.fromkeys(plans, 1) for p in nan}, 10)
