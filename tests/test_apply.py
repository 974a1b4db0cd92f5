"""Compression once, on every forward pass, and after every optimizer step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc

OPTIMIZERS = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "sgd-momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "lion": optax.lion(1e-3, weight_decay=0.1),
    "adafactor": optax.adafactor(1e-2),
}
SCHEDULE = optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=40)


def parameters(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "first": {"kernel": jax.random.normal(keys[0], (32, 24), dtype), "bias": jnp.zeros(24, dtype)},
        "second": {"kernel": jax.random.normal(keys[1], (24, 8), dtype), "bias": jnp.zeros(8, dtype)},
    }


def loss(params, x):
    h = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return ((h @ params["second"]["kernel"] + params["second"]["bias"] - x[:, :8]) ** 2).mean().astype(jnp.float32)


def stepper(tx):
    @jax.jit
    def step(params, state, key):
        x = jax.random.normal(key, (16, 32), params["first"]["kernel"].dtype)
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(step, params, state, first, last):
    for i in range(first, last):
        params, state = step(params, state, jax.random.key(i))
    return params, state


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scope", ["leaf", "global"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_pruned_weight_is_exactly_zero_after_any_optimizer(name, scope, dtype):
    params = parameters(dtype)
    plan = jc.plan(params, [(".*/kernel", jc.prune.Magnitude(sparsity=SCHEDULE, scope=scope)), (".*", None)])
    tx = optax.chain(OPTIMIZERS[name], jc.project(plan, every=5))
    step = stepper(tx)
    params, state = run(step, params, tx.init(params), 0, 50)
    masks = {path: node.mask for path, node in state[1].held.items()}
    assert set(masks) == {"first/kernel", "second/kernel"}
    zeros = 0
    for path, mask in masks.items():
        kernel = params[path.split("/")[0]]["kernel"]
        assert bool((jnp.where(mask, 0.0, kernel) == 0.0).all())
        zeros += int((kernel == 0).sum())
    total = 32 * 24 + 24 * 8
    assert zeros < total
    assert zeros >= round(0.9 * total) if scope == "global" else zeros >= round(0.9 * 768) + round(0.9 * 192)
    assert zeros <= round(0.9 * total) + 3
    assert step._cache_size() == 1


def test_kept_weights_move_as_they_would_have_moved():
    params = {"w": jax.random.normal(jax.random.key(0), (64,)), "b": jnp.ones(3)}
    plan = jc.plan(params, [("w", jc.prune.Magnitude(sparsity=0.5))])
    grads = {"w": jax.random.normal(jax.random.key(1), (64,)), "b": jnp.ones(3)}
    plain, projected = optax.sgd(0.1), optax.chain(optax.sgd(0.1), jc.project(plan))
    updates, state = projected.update(grads, projected.init(params), params)
    free, _ = plain.update(grads, plain.init(params), params)
    mask = state[1].held["w"].mask
    np.testing.assert_array_equal(updates["w"][mask], free["w"][mask])
    np.testing.assert_array_equal(updates["b"], free["b"])


def test_masks_change_on_the_steps_that_are_due_only():
    params = parameters()
    plan = jc.plan(params, [(".*/kernel", jc.prune.Magnitude(sparsity=SCHEDULE))])
    tx = optax.chain(optax.sgd(0.1), jc.project(plan, every=10))
    step, state, kept = stepper(tx), tx.init(params), []
    for i in range(31):
        params, state = step(params, state, jax.random.key(i))
        kept.append(int(state[1].held["first/kernel"].mask.sum()))
    assert len(set(kept[:10])) == len(set(kept[10:20])) == len(set(kept[20:30])) == 1
    assert kept[0] > kept[10] > kept[20] > kept[30]


def test_centroids_move_to_the_mean_of_their_weights():
    params = {"w": jnp.array([1.0, 1.2, 5.0, 5.4])}
    plan = jc.plan(params, [("w", jc.share.KMeans(clusters=2))])
    tx = optax.chain(optax.sgd(1.0), jc.project(plan, every=100))
    state = tx.init(params)
    for grads in (jnp.zeros(4), jnp.array([0.0, -1.0, 0.0, 0.0])):
        updates, state = tx.update({"w": grads}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], [1.6, 1.6, 5.2, 5.2], rtol=1e-6)


def test_low_rank_is_projected_at_refits_only():
    params = {"w": jax.random.normal(jax.random.key(0), (12, 8))}
    plan = jc.plan(params, [("w", jc.factorize.SVD(rank=2))])
    tx = optax.chain(optax.sgd(0.1), jc.project(plan, every=2))
    state, ranks = tx.init(params), []
    for i in range(4):
        grads = {"w": jax.random.normal(jax.random.key(i), (12, 8))}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        ranks.append(int(jnp.linalg.matrix_rank(params["w"], rtol=1e-4)))
    assert ranks == [2, 8, 2, 8]


def test_random_masks_under_the_transform_nest():
    params = {"w": jnp.ones(1000)}
    plan = jc.plan(params, [("w", jc.prune.Random(sparsity=optax.linear_schedule(0.0, 0.9, 9)))])
    tx = optax.chain(optax.sgd(0.0), jc.project(plan, key=jax.random.key(3)))
    state, update = tx.init(params), jax.jit(tx.update)
    previous = state[1].held["w"].mask
    for i in range(10):
        _, state = update({"w": jnp.ones(1000)}, state, params)
        mask = state[1].held["w"].mask
        assert int((~mask).sum()) == 100 * i
        assert not bool((mask & ~previous).any())
        previous = mask
    with pytest.raises(ValueError, match="w: Random needs 'key'"):
        jc.project(plan).init(params)


def test_methods_that_need_gradients_get_them():
    class Largest:
        needs = ("grad",)

        def __call__(self, w, context, /):
            return jc.formats.Masked(w, jnp.abs(context.grad) >= jnp.max(jnp.abs(context.grad)))

    params = {"w": jnp.ones(4)}
    tx = optax.chain(optax.sgd(0.0), jc.project(jc.plan(params, [("w", Largest())])))
    grads = {"w": jnp.array([0.0, 3.0, 1.0, 2.0])}
    updates, _ = tx.update(grads, tx.init(params), params, grads=grads)
    assert optax.apply_updates(params, updates)["w"].tolist() == [0, 1, 0, 0]
    with pytest.raises(ValueError, match=r"w: Largest needs 'grad', which is missing; pass grads="):
        tx.update(grads, tx.init(params), params)


def test_methods_see_the_node_of_the_last_time():
    class Grow:
        def __call__(self, w, context, /):
            known = jnp.zeros(w.shape, bool) if context.previous is None else context.previous.mask
            return jc.formats.Masked(w, known.at[jnp.sum(known)].set(True))

    params = {"w": jnp.ones(4)}
    tx = jc.project(jc.plan(params, [("w", Grow())]))
    state, kept = tx.init(params), []
    for _ in range(3):
        _, state = tx.update({"w": jnp.zeros(4)}, state, params)
        kept.append(int(state.held["w"].mask.sum()))
    assert kept == [2, 3, 4]


def test_missing_statistics_are_named():
    class Wants:
        needs = ("stats.gram",)

        def __call__(self, w, context, /):
            raise AssertionError("not reached")

    params = {"a": {"kernel": jnp.ones((2, 2))}}
    plan = jc.plan(params, [(".*", Wants())])
    with pytest.raises(
        ValueError, match=r"a/kernel: Wants needs 'stats.gram', which is missing; pass stats=jc.calibrate"
    ):
        jc.compress(params, plan)


def test_project_says_what_it_needs():
    params = {"w": jnp.ones(4)}
    plan = jc.plan(params, [("w", jc.prune.Magnitude(sparsity=0.5))])
    with pytest.raises(ValueError, match="every=0 must be a positive number"):
        jc.project(plan, every=0)
    tx = jc.project(plan)
    with pytest.raises(ValueError, match="project needs the parameters"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="made for other parameters"):
        tx.init({"v": jnp.ones(4)})


def test_project_works_inside_multi_steps_and_with_injected_hyperparameters():
    params = parameters()
    plan = jc.plan(params, [(".*/kernel", jc.prune.Magnitude(sparsity=0.5))])
    inner = optax.chain(optax.inject_hyperparams(optax.adam)(learning_rate=1e-2), jc.project(plan))
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    params, _ = run(stepper(tx), params, tx.init(params), 0, 6)
    assert int((params["first"]["kernel"] == 0).sum()) == 384


def test_simulate_trains_the_dense_parameters():
    params = parameters()
    plan = jc.plan(params, [(".*/kernel", jc.quantize.Int(bits=4))])
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, state, key):
        x = jax.random.normal(key, (32, 32))
        value, grads = jax.value_and_grad(lambda p: loss(jc.simulate(p, plan), x))(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for i in range(60):
        params, state, value = step(params, state, jax.random.key(i % 2))
        values.append(float(value))
    assert np.mean(values[-5:]) < 0.5 * np.mean(values[:5])


def test_nodes_train_by_their_own_leaves():
    params = {"w": jax.random.normal(jax.random.key(0), (8, 8))}
    small = jc.compress(
        params, jc.plan(params, [("w", jc.chain(jc.prune.Magnitude(sparsity=0.5), jc.share.KMeans(4)))])
    )
    train, held = jc.split(small)
    target = jax.random.normal(jax.random.key(1), (8, 8))

    def distance(train):
        return ((jc.materialize(jc.merge(train, held))["w"] - target) ** 2).mean()

    tx = optax.adam(0.05)
    state, before = tx.init(train), distance(train)
    for _ in range(100):
        updates, state = tx.update(jax.grad(distance)(train), state)
        train = optax.apply_updates(train, updates)
    dense = jc.materialize(jc.merge(train, held))["w"]
    assert float(distance(train)) < float(before)
    assert int((dense == 0).sum()) == 32
    assert len(np.unique(dense[dense != 0])) == 4


def test_merge_refuses_halves_of_different_trees():
    small = {"a": jnp.ones(2), "b": jnp.ones(3)}
    train, _ = jc.split(small)
    with pytest.raises(ValueError, match="merge needs the two halves that one split gave"):
        jc.merge(train, {"a": None})


def test_stochastic_nodes_take_their_key_explicitly():
    import dataclasses

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True, repr=False)
    class Noisy(jc.Compressed):
        mean: jax.Array

        def materialize(self, *, key=None):
            return self.mean if key is None else self.mean + jax.random.normal(key, self.mean.shape)

    tree = {
        "a": Noisy(jnp.zeros(4)),
        "b": jc.formats.Masked(Noisy(jnp.zeros(4)), jnp.array([True, True, False, False])),
    }
    assert jc.materialize(tree)["a"].tolist() == [0, 0, 0, 0]
    drawn = jc.materialize(tree, key=jax.random.key(0))
    assert bool((drawn["a"] != 0).all())
    assert drawn["b"][2:].tolist() == [0, 0]
    assert bool((drawn["a"][:2] != drawn["b"][:2]).all())


def test_finalize_clears_what_a_mask_hides():
    node = jc.formats.Masked(jnp.arange(4.0) + 1, jnp.array([True, False, True, False]))
    assert jc.finalize({"w": node})["w"].values.tolist() == [1, 0, 3, 0]


@pytest.mark.parametrize(
    "method", [jc.prune.Magnitude(sparsity=0.6), jc.quantize.Int(bits=4), jc.factorize.SVD(rank=2)]
)
def test_a_wrapped_optimizer_is_the_chained_one(method):
    params = {"w": jax.random.normal(jax.random.key(0), (8, 6)), "b": jnp.ones(6)}
    plan = jc.plan(params, [("w", method)])
    chained = optax.chain(optax.adamw(1e-2), jc.project(plan, every=3))
    wrapped = jc.project(plan, every=3, inner=optax.adamw(1e-2))
    ends = []
    for tx in (chained, wrapped):
        now, state = params, tx.init(params)
        step = jax.jit(tx.update)
        for i in range(7):
            grads = jax.tree.map(lambda x, i=i: jnp.cos(x + i), now)
            updates, state = step(grads, state, now)
            now = optax.apply_updates(now, updates)
        ends.append(now)
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert ((a == 0) == (b == 0)).all()


def test_a_wrapped_optimizer_hands_its_gradients_to_the_method():
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Grows:
        needs = ("grad",)

        def __call__(self, w, context, /):
            seen.append(context.grad)
            return jc.prune.Magnitude(sparsity=0.5)(context.grad)

    params = {"w": jnp.array([[1.0, 2.0]])}
    tx = jc.project(jc.plan(params, [("w", Grows())]), inner=optax.sgd(0.1))
    updates, _ = tx.update({"w": jnp.array([[5.0, 1.0]])}, tx.init(params), params)
    np.testing.assert_allclose(optax.apply_updates(params, updates)["w"], [[0.5, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("method", [jc.prune.Magnitude(sparsity=0.5), jc.factorize.SVD(rank=2)])
def test_a_step_can_be_differentiated_in_reverse_mode(wrapped, method):
    params = parameters()
    plan = jc.plan(params, [(".*kernel", method)])
    sgd = optax.sgd(0.1)
    tx = jc.project(plan, every=2, inner=sgd) if wrapped else optax.chain(sgd, jc.project(plan, every=2))
    x = jax.random.normal(jax.random.key(5), (16, 32))

    @jax.jit
    def after(scale, params, state):
        updates, state = tx.update(jax.grad(loss)(jax.tree.map(lambda w: w * scale, params), x), state, params)
        new = optax.apply_updates(params, updates)
        return loss(new, x), (new, state)

    state = tx.init(params)
    for _ in range(3):
        slope, (now, later) = jax.grad(after, has_aux=True)(1.0, params, state)
        low, high = (after(1.0 + change, params, state)[0] for change in (-3e-3, 3e-3))
        np.testing.assert_allclose(slope, (high - low) / 6e-3, rtol=2e-2, atol=1e-6)
        params, state = now, later


def test_a_schedule_at_a_known_step_foretells_the_size_of_shapes():
    shapes = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    ramp = optax.linear_schedule(0.0, 0.75, transition_steps=10)
    sizes = [
        jc.nbits(jax.eval_shape(lambda params, plan=plan: jc.compress(params, plan, step=20), shapes))
        for plan in (jc.plan(shapes, [("w", jc.prune.Magnitude(sparsity=x))]) for x in (ramp, 0.75))
    ]
    assert sizes[0] == sizes[1] < 16 * 64 * 64
