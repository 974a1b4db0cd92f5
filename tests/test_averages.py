"""Averages of parameters, optimizers of two copies, transforms that see a part of the tree: the zeros stay."""

import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

import jcompress as jc

PARAMS = {
    "a": {"kernel": jax.random.normal(jax.random.key(0), (16, 8))},
    "b": {"kernel": jax.random.normal(jax.random.key(1), (8, 4)), "bias": jnp.ones(4)},
}
X = jax.random.normal(jax.random.key(2), (32, 16))
RAMP = optax.linear_schedule(0.0, 0.5, transition_steps=6)
STEPS = 14
SGD, HALF = optax.sgd(0.1), jc.prune.Magnitude(sparsity=0.5)
WHOLE = jc.plan(PARAMS, [(".*/kernel", HALF)])
PRUNE = jc.plan(PARAMS, [(".*/kernel", jc.prune.Magnitude(sparsity=RAMP))])


def loss(params):
    hidden = jnp.tanh(X @ params["a"]["kernel"])
    return jnp.square(hidden @ params["b"]["kernel"] + params["b"]["bias"] - 1).mean()


def trained(tx, params=PARAMS, seen=lambda p: p, averaged=None):
    """Parameters and state after the ramp; ``averaged`` folds each step's parameters."""

    @jax.jit
    def step(params, state, average):
        updates, state = tx.update(jax.grad(lambda p: loss(seen(p)))(params), state, params)
        params = optax.apply_updates(params, updates)
        return params, state, None if averaged is None else averaged(params, average)

    state, average = tx.init(params), params
    for _ in range(STEPS):
        params, state, average = step(params, state, average)
    return params, state, average


def zeros(tree):
    return [float((x == 0).mean()) for path, x in jc.paths(jc.materialize(tree)) if path.endswith("kernel")]


@pytest.mark.parametrize("every", [1, 4])
def test_a_moving_average_gets_the_zeros_of_the_parameters(every, tmp_path):
    tx = optax.chain(optax.adam(0.01), jc.project(PRUNE, every=every))
    params, state, average = trained(tx, averaged=lambda new, old: optax.incremental_update(new, old, 0.3))
    assert zeros(params) == [0.5, 0.5] and zeros(average) != [0.5, 0.5]
    small = jc.nodes(average, state)
    jc.save(tmp_path / "average", small)
    again = jc.materialize(jc.load(tmp_path / "average"))
    for (path, w), (_, mean), (_, kept) in zip(jc.paths(params), jc.paths(average), jc.paths(again), strict=True):
        assert bool((kept == jnp.where((w == 0) & path.endswith("kernel"), 0, mean)).all())


def schedule_free(project):
    tx = optax.chain(contrib.schedule_free_adamw(0.01, warmup_steps=2), project)
    return tx, lambda params, state: contrib.schedule_free_eval_params(state[0], params)


OPTIMIZERS = {
    "schedule-free": schedule_free,
    "accumulated": lambda project: (optax.chain(optax.MultiSteps(optax.adam(0.01), 2), project), None),
    "accumulating": lambda project: (optax.MultiSteps(optax.chain(optax.adam(0.01), project), 2), None),
    "sam": lambda project: (optax.chain(contrib.sam(optax.adam(0.01), optax.sgd(0.05)), project), None),
    "mechanize": lambda project: (optax.chain(contrib.mechanize(optax.adam(0.01)), project), None),
    "finite": lambda project: (optax.chain(optax.apply_if_finite(optax.adam(0.01), 3), project), None),
    "all-finite": lambda project: (optax.apply_if_finite(optax.chain(optax.adam(0.01), project), 3), None),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_that_keep_more_than_parameters(name):
    tx, evaluated = OPTIMIZERS[name](jc.project(PRUNE))
    params, state, _ = trained(tx)
    assert zeros(params) == [0.5, 0.5]
    used = params if evaluated is None else evaluated(params, state)
    small = jc.nodes(used, state)
    assert zeros(small) == [0.5, 0.5] and loss(jc.materialize(small)) < loss(PARAMS)
    assert all(isinstance(small[name]["kernel"], jc.formats.Masked) for name in "ab")


def test_both_copies_of_lookahead_have_one_mask():
    both = optax.LookaheadParams.init_synced(PARAMS)
    method = jc.prune.Magnitude(sparsity=RAMP, pattern=jc.prune.Shared())
    plan = jc.plan(both, [(f"(fast|slow)/{name}/kernel", method) for name in "ab"])
    optimizer = optax.lookahead(optax.adam(0.01), sync_period=4, slow_step_size=0.5)
    tx = optax.chain(optimizer, jc.project(plan))
    # Lookahead takes the gradients of the fast copy alone.
    grads = jax.jit(lambda p: jax.grad(loss)(p.fast))
    update = jax.jit(lambda g, s, p: tx.update(g, s, p))
    state = tx.init(both)
    for _ in range(STEPS):
        updates, state = update(grads(both), state, both)
        both = optax.apply_updates(both, updates)
    assert zeros(both.fast) == zeros(both.slow) == [0.5, 0.5]
    assert bool(((both.fast["a"]["kernel"] == 0) == (both.slow["a"]["kernel"] == 0)).all())
    small = jc.nodes(both, state).slow
    assert zeros(small) == [0.5, 0.5] and loss(jc.materialize(small)) < loss(PARAMS)


@pytest.mark.parametrize("period", [2, 4, 8])
@pytest.mark.parametrize("steps", [8, 9, 17])
def test_lookahead_around_the_transform(period, steps):
    tx = optax.lookahead(optax.chain(optax.adam(0.01), jc.project(WHOLE)), period, 0.5)
    both = optax.LookaheadParams.init_synced(PARAMS)

    @jax.jit
    def step(both, state):
        updates, state = tx.update(jax.grad(loss)(both.fast), state, both)
        return optax.apply_updates(both, updates), state

    state = tx.init(both)
    for _ in range(steps):
        both, state = step(both, state)
    (held,) = (x.held for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "held")) if hasattr(x, "held"))
    small = jc.nodes(both, state)
    for copy, dense in ((small.slow, both.slow), (small.fast, both.fast), (jc.nodes(both.slow, state), both.slow)):
        assert zeros(copy) == [0.5, 0.5]
        for name in "ab":
            node, w = copy[name]["kernel"], dense[name]["kernel"]
            assert bool((node.mask == held[f"{name}/kernel"].mask).all())
            assert bool((node.materialize() == jnp.where(node.mask, w, 0)).all())


def test_an_optimizer_that_moves_what_was_projected_is_found_out():
    for tx in (contrib.mechanize(optax.chain(SGD, jc.project(WHOLE))), optax.chain(jc.project(WHOLE), SGD)):
        params, state, _ = trained(tx)
        with pytest.raises(ValueError, match=r"a/kernel: .*last link.*behind an optimizer that wraps others too"):
            jc.nodes(params, state)


LABELS = {"a": {"kernel": "x"}, "b": {"kernel": "y", "bias": "y"}}


def partitioned(plan, branch="x"):
    other = {"x": "y", "y": "x"}[branch]
    return optax.partition({branch: optax.chain(SGD, jc.project(plan)), other: SGD}, LABELS)


def masked(plan, mask):
    return optax.chain(SGD, optax.masked(jc.project(plan), mask))


ONLY_A = jc.plan(PARAMS, [("a/kernel", HALF)])
PART = jc.plan({"a": PARAMS["a"]}, [(".*/kernel", HALF)])
SUBTREE = jc.plan(PARAMS["a"], [("kernel", HALF)])


@pytest.mark.parametrize(
    "tx",
    [
        partitioned(WHOLE), partitioned(ONLY_A), partitioned(PART), masked(WHOLE, {"a": True, "b": False}),
        masked(PART, {"a": True, "b": False}), masked(ONLY_A, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    ],
)  # fmt: skip
def test_a_part_of_the_tree_is_held(tx):
    state = tx.init(PARAMS)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    assert zeros(params) == zeros(jc.nodes(params, state)) == [0.5, 0.0]


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (partitioned(ONLY_A, "y"), r"a/kernel: optax.masked or optax.partition hides it .* shown is \['b/bias', 'b/ke"),
        (
            masked(ONLY_A, {"a": False, "b": True}),
            "a/kernel: optax.masked or optax.partition hides it .* plan for those",
        ),
        (
            partitioned(SUBTREE),
            r"not in the plan \['a/kernel'\], .* the plan is that of a part, so plan for all of them",
        ),
        (jc.project(PART), "plan is that of a part, so plan for all of them"),
    ],
)
def test_a_plan_that_serves_another_part_says_so(tx, message):
    with pytest.raises(ValueError, match=message):
        tx.init(PARAMS)


@pytest.mark.parametrize("part", [PARAMS["a"], {"a": PARAMS["a"]}, {"a": PARAMS["a"], "b": {"kernel": None}}])
def test_a_part_met_by_the_plan_of_the_whole(part):
    for call in (jc.project(WHOLE).init, lambda part: jc.compress(part, WHOLE)):
        with pytest.raises(
            ValueError, match=r"these are a part of the parameters, so plan for the part: jc.plan\(part"
        ):
            call(part)
