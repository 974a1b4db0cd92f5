"""Units cut while training: exactly zero after every step, on the schedule of the cost, cut out at the end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc
from jcompress.prune import structured


def mlp(p, x):
    h = jax.nn.relu(x @ p["one"]["kernel"] + p["one"]["bias"])
    return jax.nn.relu(h @ p["two"]["kernel"] + p["two"]["bias"]) @ p["head"]


@pytest.fixture
def task(rng):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)  # noqa: E731
    params = {
        "one": {"kernel": draw(6, 12), "bias": draw(12)}, "two": {"kernel": draw(12, 10), "bias": draw(10)},
        "head": draw(10, 3),
    }  # fmt: skip
    x = draw(64, 6)
    return params, x, jnp.sin(x @ draw(6, 3))


def trained(params, x, y, tx, steps):
    """The parameters and the state after each step."""

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((mlp(p, x) - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
        yield params, state
    assert step._cache_size() == 1


@pytest.mark.parametrize("scope", ["group", "global"])
def test_the_cost_follows_its_schedule_and_ends_in_a_smaller_network(task, scope):
    params, x, y = task
    groups = jc.trace.coupling(mlp, params, x)
    ramp = optax.linear_schedule(1.0, 0.4, 20)
    cut = structured.prune_units(groups, every=5, cost=ramp, scope=scope, normalize="mean")
    whole, before = groups.multiply_adds({}), None
    for i, (now, state) in enumerate(trained(params, x, y, optax.chain(optax.adamw(1e-2), cut), 30)):
        keep = structured.kept_units(state)
        target = float(ramp(i - i % 5))
        sizes = {name: int(kept.sum()) for name, kept in keep.items()}
        near = [groups.multiply_adds({**sizes, n: s + d}) for n, s in sizes.items() for d in (-1, 1)]
        step = max(abs(c - groups.multiply_adds(sizes)) for c in near)
        assert abs(groups.multiply_adds(keep) - target * whole) <= step
        for a, b in zip(jax.tree.leaves(now), jax.tree.leaves(jc.trace.mask(now, groups, keep)), strict=True):
            np.testing.assert_array_equal(a, b)
        assert before is None or all(bool((before[name] | ~keep[name]).all()) for name in keep), "what is cut stays cut"
        before = keep
    for wanted in (keep, None):
        small_fn, small = jc.shrink(mlp, now, wanted, x)
        np.testing.assert_allclose(small_fn(small, x), mlp(now, x), rtol=1e-5, atol=1e-6)
        assert jc.trace.cost(small_fn, small, x).total.multiply_adds == groups.multiply_adds(keep)
    assert float(jnp.mean((small_fn(small, x) - y) ** 2)) < 0.5 * float(jnp.mean((mlp(params, x) - y) ** 2))


def test_the_first_choice_is_that_of_keep_and_others_units_move_as_they_would(task):
    params, x, y = task
    groups = jc.trace.coupling(mlp, params, x)
    name = next(n for n in groups if ("one/kernel", 1) in groups[n].members)
    score = lambda p: {name: structured.l1(p, groups)[name]}  # noqa: E731
    alone = optax.sgd(0.1)
    tx = optax.chain(alone, structured.prune_units(groups, sparsity=0.25, score=score))
    grads = jax.grad(lambda p: jnp.mean((mlp(p, x) - y) ** 2))(params)
    updates, state = tx.update(grads, tx.init(params), params)
    moved = optax.apply_updates(params, alone.update(grads, alone.init(params))[0])
    keep = structured.keep(score(moved), groups, 0.25)
    assert list(structured.kept_units(state)) == [name]
    np.testing.assert_array_equal(structured.kept_units(state)[name], keep[name])
    expected = jc.trace.mask(moved, groups, keep)
    for a, b in zip(jax.tree.leaves(optax.apply_updates(params, updates)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_state_gives_nodes_and_a_part_of_the_tree_will_do(task):
    params, x, y = task
    variables = {"params": params, "other": jnp.ones(3)}
    groups = jc.trace.coupling(lambda v, x: mlp(v["params"], x), variables, x)
    cut = structured.prune_units(groups.within("params"), cost=0.5)
    *_, (now, state) = trained(params, x, y, optax.chain(optax.adam(1e-2), cut), 3)
    nodes = dict(jc.paths(jc.nodes(now, state)))
    assert all(isinstance(node, jc.formats.Masked) for node in nodes.values())
    for path, leaf in jc.paths(now):
        np.testing.assert_array_equal(nodes[path].materialize(), leaf)
        assert nodes[path].mask.shape == leaf.shape
    small_fn, small = jc.shrink(
        lambda v, x: mlp(v["params"], x), variables | {"params": now}, structured.kept_units(state), x
    )
    np.testing.assert_allclose(small_fn(small, x), mlp(now, x), rtol=1e-5, atol=1e-6)


def test_mistakes_are_explained(task):
    params, x, _ = task
    groups = jc.trace.coupling(mlp, params, x)
    with pytest.raises(ValueError, match="every=0 must be a positive number"):
        structured.prune_units(groups, 0, cost=0.5)
    tx = structured.prune_units(groups, cost=0.5)
    with pytest.raises(ValueError, match=r"call tx.update\(grads, state, params\)"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="expected one of the two"):
        bare = structured.prune_units(groups)
        bare.update(params, bare.init(params), params)
    with pytest.raises(ValueError, match="found 0 states of prune_units"):
        structured.kept_units(optax.adam(1e-3).init(params))
    with pytest.raises(ValueError, match="there is no such group"):
        structured.prune_units(groups, cost=0.5, score=lambda p: {"elsewhere": jnp.ones(3)}).init(params)
