"""Sparse training: any optimizer, a constant count, fresh moments; what each rule drops and grows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_conformance import collectives

import jcompress as jc
from jcompress.prune import dynamic
from jcompress.prune.dynamic import leaves

LABELS = {"a": {"kernel": "adam", "bias": "sgd"}, "b": {"kernel": "sgd"}}
KERNELS_ONLY = {"a": {"kernel": True, "bias": False}, "b": {"kernel": True}}
OPTIMIZERS = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "sgd-momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "lion": optax.lion(1e-3, weight_decay=0.1),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=6, momentum=0.9),
    "adagrad": optax.adagrad(1e-2),
    "muon": optax.contrib.muon(1e-2),
    "schedule-free": optax.contrib.schedule_free_adamw(1e-2, weight_decay=0.1),
    "inject": optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(1e-2, 1e-3, 10)),
    "multi-steps": optax.MultiSteps(optax.adam(1e-2), 2),
    "partition": optax.partition({"adam": optax.adam(1e-2), "sgd": optax.sgd(0.1, momentum=0.9)}, LABELS),
    "chain": optax.chain(optax.clip_by_global_norm(0.1), optax.scale_by_adam(), optax.scale(-1e-2)),
    "masked": optax.chain(optax.masked(optax.trace(0.9), KERNELS_ONLY), optax.scale(-1e-2)),
}
RULES = {
    "SET": dynamic.SET(),
    "RigL": dynamic.RigL(stop=100),
    "sparse-momentum": dynamic.SparseMomentum(fraction=0.3),
    "DSR": dynamic.DSR(fraction=0.3, threshold=0.1),
}
SIZE, KEPT = {"a/kernel": 48, "b/kernel": 24}, {"a/kernel": 14, "b/kernel": 7}

KEY = jax.random.key(0)


def parameters(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (8, 6), dtype), "bias": jnp.ones(6, dtype)},
        "b": {"kernel": jax.random.normal(keys[1], (6, 4), dtype)},
    }


def loss(params, x):
    h = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"])
    return ((h @ params["b"]["kernel"] - x[:, :4]) ** 2).mean().astype(jnp.float32)


def random_plan(params):
    return jc.plan(params, [(".*/kernel", jc.prune.Random(sparsity=0.7))])


def roll(found, memory):
    """A rule that compiles in no time: every mask moves on by one row."""
    return [jnp.roll(x.mask, 1, axis=0) for x in found], memory


def random_masks():
    rng = np.random.default_rng(0)
    return {
        path: jnp.asarray(rng.permutation(np.arange(SIZE[path]) < KEPT[path]).reshape(w.shape))
        for path, w in kernels(parameters()).items()
    }


def stepper(tx):
    @jax.jit
    def step(params, state, key):
        x = jax.random.normal(key, (16, 8), params["a"]["kernel"].dtype)
        grads = jax.grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    return step


def kernels(params):
    return {"a/kernel": params["a"]["kernel"], "b/kernel": params["b"]["kernel"]}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_trains_at_a_constant_count_with_fresh_moments(name):
    params = parameters()
    tx = dynamic.sparse(OPTIMIZERS[name], roll, random_masks(), every=3)
    step, state, moved, held = stepper(tx), tx.init(params), 0, 0
    start = jax.tree.leaves(OPTIMIZERS[name].init(jax.tree.map(jnp.zeros_like, params)))
    for i in range(10):
        before = state.masks
        params, state, _ = step(params, state, jax.random.key(i))
        for path, w in kernels(params).items():
            mask = state.masks[path]
            assert int(mask.sum()) == KEPT[path]
            idle = ~mask | ~before[path]  # pruned, or grown in this very step
            assert bool((jnp.where(idle, w, 0.0) == 0.0).all())
            moved += int((mask & ~before[path]).sum())
            values = zip(jax.tree.leaves(state.inner), start, strict=True)
            for x, first in [(x, y) for x, y in values if jnp.shape(x) == w.shape]:
                # Adafactor adds 1e-30 to a squared gradient of zero.
                np.testing.assert_allclose(np.asarray(x)[idle], np.asarray(first)[idle], rtol=0, atol=1e-29)
                held += 1
    assert moved > 0
    assert held > 0
    assert step._cache_size() == 1
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((params, state.inner)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_rule_keeps_its_count_under_any_optimizer(name, rule):
    params = parameters()
    tx = dynamic.sparse(OPTIMIZERS[name], RULES[rule], random_masks(), every=2, key=KEY)
    step, state, moved = stepper(tx), tx.init(params), 0
    for i in range(7):
        before = state.masks
        params, state, _ = step(params, state, jax.random.key(i))
        assert sum(int(mask.sum()) for mask in state.masks.values()) == sum(KEPT.values())
        for path, w in kernels(params).items():
            mask = state.masks[path]
            assert rule not in ("SET", "RigL") or int(mask.sum()) == KEPT[path]
            assert bool((jnp.where(mask & before[path], 0.0, w) == 0.0).all())
            moved += int((mask & ~before[path]).sum())
    assert moved > 0
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((params, state.inner)))


def test_weights_that_stay_active_move_as_under_the_optimizer_alone():
    params = parameters()
    adam, tx = optax.adam(1e-2), dynamic.sparse(optax.adam(1e-2), dynamic.Static(), random_masks())
    state = tx.init(params)
    masks = state.masks
    alone, plain = dynamic.lay(params, masks), adam.init(params)
    params = alone
    step = stepper(tx)
    for i in range(3):
        x = jax.random.normal(jax.random.key(i), (16, 8))
        updates, plain = adam.update(dynamic.lay(jax.grad(loss)(alone, x), masks), plain, alone)
        alone = optax.apply_updates(alone, updates)
        params, state, _ = step(params, state, jax.random.key(i))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-7)
    assert all(bool((masks[p] == state.masks[p]).all()) for p in masks)


def test_the_averages_of_schedule_free_are_sparse_too():
    params = parameters()
    tx = dynamic.sparse(OPTIMIZERS["schedule-free"], roll, random_masks(), every=2)
    step, state = stepper(tx), tx.init(params)
    for i in range(5):
        params, state, _ = step(params, state, jax.random.key(i))
    averaged = kernels(optax.contrib.schedule_free_eval_params(state.inner, params))
    for path, w in averaged.items():
        assert bool((jnp.where(state.masks[path], 0.0, w) == 0.0).all())


def test_half_precision_and_outer_wrappers():
    params = parameters(jnp.bfloat16)
    inner = dynamic.sparse(optax.adamw(1e-2), roll, random_masks(), every=1)
    tx = optax.MultiSteps(optax.chain(optax.clip(1.0), inner), 2).gradient_transformation()
    step, state = stepper(tx), tx.init(params)
    params = dynamic.lay(params, dynamic.masks_of(state))
    for i in range(6):
        params, state, _ = step(params, state, jax.random.key(i))
        for path, w in kernels(params).items():
            mask = dynamic.masks_of(state)[path]
            assert int(mask.sum()) == KEPT[path]
            assert bool((jnp.where(mask, 0, w) == 0).all())
    assert params["a"]["kernel"].dtype == jnp.bfloat16


def leaf(seed=0, shape=(8, 6), kept=20, momentum=False, scale=1.0):
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, bool)
    mask.flat[rng.permutation(mask.size)[:kept]] = True
    w, grad = rng.normal(size=shape) * mask, rng.normal(size=shape)
    known = jnp.asarray(rng.normal(size=shape) * scale, jnp.float32) if momentum else None
    return leaves.Leaf(
        jnp.asarray(w, jnp.float32), jnp.asarray(mask), jnp.asarray(grad, jnp.float32), known, jnp.int32(0),
        jax.random.key(seed),
    )  # fmt: skip


def smallest(found, number):
    """Positions of the active weights of smallest magnitude, by sorting."""
    active = np.flatnonzero(found.mask)
    return set(active[np.argsort(np.abs(np.asarray(found.w).ravel()[active]))[:number]])


def test_rigl_drops_the_smallest_weights_and_grows_the_largest_gradients():
    found = leaf()
    ((mask,), _) = dynamic.RigL(stop=100, fraction=0.3)([found], ())
    survivors = set(np.flatnonzero(found.mask)) - smallest(found, 6)
    others = np.array(sorted(set(range(48)) - survivors))
    largest = others[np.argsort(-np.abs(np.asarray(found.grad).ravel()[others]))[:6]]
    assert set(np.flatnonzero(mask)) == survivors | set(largest)


def test_rigl_follows_the_cosine_and_stops():
    rule = dynamic.RigL(stop=40, fraction=0.3)
    for t in range(40):
        assert float(rule.fraction_at(t)) == pytest.approx(0.15 * (1 + np.cos(np.pi * t / 40)), abs=1e-6)
    assert float(rule.fraction_at(40)) == float(rule.fraction_at(1000)) == 0.0
    found = leaf()._replace(step=jnp.int32(40))
    np.testing.assert_array_equal(rule([found], ())[0][0], found.mask)
    constant = dynamic.RigL(stop=40, fraction=optax.constant_schedule(0.5))
    assert [float(constant.fraction_at(t)) for t in (0, 39, 40)] == [0.5, 0.5, 0.0]


def test_set_drops_the_smallest_and_grows_uniformly():
    found = leaf()
    survivors = np.asarray(found.mask).copy()
    survivors.flat[list(smallest(found, 6))] = False
    draws = jax.vmap(lambda k: dynamic.SET(0.3)([found._replace(key=k)], ())[0][0])(
        jax.random.split(jax.random.key(1), 4000)
    )
    assert bool((draws.sum((1, 2)) == 20).all())
    assert bool(draws[:, survivors].all())
    rates = np.asarray(draws).mean(0)[~survivors]
    expected = 6 / 34
    assert np.abs(rates - expected).max() < 5 * (expected * (1 - expected) / 4000) ** 0.5


@pytest.mark.parametrize("seed", range(5))
def test_parts_add_up_exactly_and_leave_no_room_exceeded(seed):
    rng = np.random.default_rng(seed)
    room = rng.integers(0, 50_000_000 if seed % 2 else 30, 6).astype(np.uint32)
    total = np.uint32(rng.integers(0, room.sum() + 1))
    shares = rng.exponential(size=6) * (rng.random(6) < 0.7)
    given = np.asarray(leaves.apportion(jnp.uint32(total), jnp.float32(shares), jnp.asarray(room)))
    assert given.sum() == total
    assert (given <= room).all()
    free = np.asarray(leaves.apportion(jnp.uint32(1000), jnp.float32([1, 2, 5]), jnp.full(3, 10_000, jnp.uint32)))
    np.testing.assert_array_equal(free, [125, 250, 625])


def test_sparse_momentum_moves_weights_to_where_the_momentum_is():
    found = [leaf(0, momentum=True), leaf(1, momentum=True, scale=3.0)]
    masks, _ = dynamic.SparseMomentum(fraction=0.25)(found, ())
    assert sum(int(m.sum()) for m in masks) == 40
    means = [float(jnp.abs(x.momentum)[x.mask].mean()) for x in found]
    expected = 10 * means[1] / sum(means)
    grown = int(masks[1].sum()) - 15
    assert abs(grown - expected) <= 1
    assert grown > 5
    for x, mask in zip(found, masks, strict=True):
        survivors = set(np.flatnonzero(x.mask)) - smallest(x, 5)
        others = np.array(sorted(set(range(48)) - survivors))
        number = int(mask.sum()) - 15
        largest = others[np.argsort(-np.abs(np.asarray(x.momentum).ravel()[others]))[:number]]
        assert set(np.flatnonzero(mask)) == survivors | set(largest)


def test_the_momentum_is_the_average_of_dense_gradients():
    params = parameters()
    rule = dynamic.SparseMomentum(fraction=0.5, decay=0.5)
    tx = dynamic.sparse(optax.sgd(0.1), rule, random_plan(params), every=2, key=KEY)
    step, state, expected = stepper(tx), tx.init(params), 0.0
    for i in range(4):
        params, state, grads = step(params, state, jax.random.key(i))
        expected = 0.5 * expected + 0.5 * grads["a"]["kernel"]
        assert sum(int(m.sum()) for m in state.masks.values()) == sum(KEPT.values())
        assert all(bool((w[~state.masks[p]] == 0).all()) for p, w in kernels(params).items())
    np.testing.assert_allclose(np.asarray(state.momentum["a/kernel"]), np.asarray(expected), rtol=1e-5)


def test_dsr_has_one_threshold_that_adapts():
    found, rule = [leaf(0), leaf(1, kept=10)], dynamic.DSR(fraction=0.2, threshold=0.1)
    for threshold, factor in ((1e-6, 2.0), (5.0, 0.5)):
        masks, after = rule(found, jnp.float32(threshold))
        assert sum(int(m.sum()) for m in masks) == 30
        assert float(after) == pytest.approx(threshold * factor)
    sizes = np.sort(np.concatenate([np.abs(np.asarray(x.w)[np.asarray(x.mask)]) for x in found]))
    masks, after = rule(found, jnp.float32(sizes[6]))  # exactly six of thirty lie below
    assert float(after) == pytest.approx(float(sizes[6]))
    left = [(np.abs(np.asarray(x.w)) >= sizes[6]) & np.asarray(x.mask) for x in found]
    for x, mask in zip(left, masks, strict=True):
        assert bool(np.asarray(mask)[x].all())
        assert abs(int(mask.sum()) - x.sum() - 6 * x.sum() / 24) <= 1


@pytest.mark.parametrize("rule", [dynamic.RigL(stop=100), dynamic.DSR()], ids=["RigL", "DSR"])
def test_only_scalars_cross_devices(rule):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P(None, "model"))
    params = {"w": jax.device_put(jax.random.normal(jax.random.key(0), (64, 64)), sharding)}
    plan = jc.plan(params, [(".*", jc.prune.Magnitude(sparsity=0.8))])
    tx = dynamic.sparse(optax.adam(1e-2), rule, plan, every=1, key=KEY)
    state = jax.jit(tx.init)(params)
    lowered = jax.jit(tx.update).lower(params, state, params).compile()
    assert max(size for _, size in collectives(lowered.as_text())) <= 16
    for x in jax.tree.leaves(lowered.output_shardings[0]):
        assert x.is_equivalent_to(sharding, 2)


def test_masks_may_be_given_and_are_found_again():
    params = {"w": jnp.ones(4), "v": jnp.ones(2)}
    mask = jnp.array([True, False, True, False])
    tx = optax.chain(dynamic.sparse(optax.sgd(0.5), dynamic.Static(), {"w": mask}), optax.identity())
    state = tx.init(params)
    np.testing.assert_array_equal(dynamic.masks_of(state)["w"], mask)
    updates, state = tx.update(params, state, params)
    assert optax.apply_updates(params, updates)["w"].tolist() == [0.5, 0.0, 0.5, 0.0]


def test_errors_name_what_is_wrong():
    params = {"w": jnp.ones(4)}
    plan = jc.plan(params, [("w", jc.prune.Magnitude(sparsity=0.5))])
    with pytest.raises(ValueError, match="every=0 must be a positive"):
        dynamic.sparse(optax.sgd(1.0), dynamic.SET(), plan, every=0)
    tx = dynamic.sparse(optax.sgd(1.0), dynamic.SET(), plan)
    with pytest.raises(ValueError, match="sparse needs the parameters"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"w: found Int.*gives a Quantized"):
        dynamic.sparse(optax.sgd(1.0), dynamic.SET(), jc.plan(params, [("w", jc.quantize.Int(bits=4))])).init(params)
    with pytest.raises(ValueError, match=r"w: found a mask of shape \(3,\)"):
        dynamic.sparse(optax.sgd(1.0), dynamic.SET(), {"w": jnp.ones(3, bool)}).init(params)
    with pytest.raises(ValueError, match="u: a mask is given but there is no such parameter"):
        dynamic.sparse(optax.sgd(1.0), dynamic.SET(), {"u": jnp.ones(3, bool)}).init(params)
    with pytest.raises(ValueError, match="found no masks"):
        dynamic.masks_of(optax.adam(1.0).init(params))
    with pytest.raises(ValueError, match="has no key; give sparse"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="momentum, which is missing"):
        dynamic.SparseMomentum()([leaf()], ())


@pytest.mark.parametrize("rule", ["SET", "DSR"])
def test_steps_can_be_differentiated_also_where_the_masks_change(rule):
    params = parameters()
    plan = jc.plan(params, [(".*kernel", jc.prune.Random(sparsity=0.7))])
    batch = jax.random.normal(jax.random.key(1), (4, 8))

    @jax.jit
    def after(rate, params):
        tx = dynamic.sparse(optax.sgd(rate, momentum=0.9), RULES[rule], plan, every=2, key=KEY)
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
            params = optax.apply_updates(params, updates)
        return loss(params, batch)

    found = jax.grad(after)(0.05, params)
    step = 1e-3
    slope = (after(0.05 + step, params) - after(0.05 - step, params)) / (2 * step)
    np.testing.assert_allclose(found, slope, rtol=0.02)
    assert float(jnp.abs(found)) > 0


@pytest.mark.parametrize(
    ("rule", "dropped"),
    [
        (dynamic.SET(0.5), 4),
        (dynamic.DSR(0.5, threshold=4.5), 4),
        (dynamic.SparseMomentum(0.5), 4),
        (dynamic.NeST(growth=1.0, pruning=0.5), 4),
        (dynamic.RigL(stop=100, fraction=lambda step: 0.5), 0),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_dropped_and_grown_at_once_starts_anew(rule, dropped):
    """With no dormant weight there is nothing else to grow; NeST alone may leave a mask smaller."""
    params, tx = (
        {"w": jnp.arange(1.0, 9.0)},
        dynamic.sparse(optax.adam(0.0), rule, {"w": jnp.ones(8, bool)}, 2, key=KEY),
    )
    state = tx.init(params)._replace(steps=jnp.int32(1))
    for i in range(2):
        updates, state = tx.update({"w": jnp.full(8, 1.0 + i)}, state, params)
        params = optax.apply_updates(params, updates)
    rising = np.arange(1.0, 9.0)
    moments = np.full(8, 0.9 * 0.1 * 1 + 0.1 * 2)
    assert params["w"].tolist() == np.where(rising > dropped, rising, 0).tolist()
    np.testing.assert_allclose(state.inner[0].mu["w"], np.where(rising > dropped, moments, 0), rtol=1e-6)
    assert state.masks["w"][dropped:].all()
    if not isinstance(rule, dynamic.NeST):
        assert state.masks["w"].all()
