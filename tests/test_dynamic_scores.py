"""Learned scores and thresholds: what they pass forward and backward, and what they never touch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc
from jcompress.numeric import packing
from jcompress.prune import dynamic

KEY = jax.random.key(3)


def array(shape=(8, 6), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def compressed(method, w=None):
    params = {"w": array() if w is None else w}
    plan = jc.plan(params, [("w", method)])
    return plan, jc.compress(params, plan, key=KEY)


def pulled(node, g):
    """The gradients of ``sum(g * dense)`` in the trainable leaves."""
    train, held = jc.split(node)
    return jax.grad(lambda t: jnp.sum(g * jc.merge(t, held).materialize()))(train)


@pytest.mark.parametrize(
    "method",
    [dynamic.EdgePopup(sparsity=0.5), dynamic.EdgePopup(sparsity=0.5, signs=True), dynamic.Movement(0.5)],
    ids=repr,
)
def test_scores_get_the_gradient_times_the_weight_also_where_masked(method):
    w, g = array(), array(seed=1)
    _, tree = compressed(method, w)
    found = pulled(tree["w"], g)
    np.testing.assert_allclose(np.asarray(found.scores), np.asarray(g * w), rtol=1e-6)
    assert bool((found.scores[~tree["w"].mask] != 0).all())
    if isinstance(method, dynamic.Movement):
        np.testing.assert_array_equal(np.asarray(found.weights), np.where(tree["w"].mask, g, 0))
    else:
        assert not jax.tree.leaves(found.weights)


def trained(method, steps=20):
    plan, tree = compressed(method)
    train, held = jc.split(tree)
    tx = optax.adamw(0.05, weight_decay=0.5)

    def loss(train, held):
        node = dynamic.select(jc.merge(train, held), plan)["w"]
        return jnp.sum((node.materialize() - array(seed=2)) ** 2)

    @jax.jit
    def step(train, state):
        updates, state = tx.update(jax.grad(loss)(train, held), state, train)
        return optax.apply_updates(train, updates), state

    state, first = tx.init(train), loss(train, held)
    for _ in range(steps):
        train, state = step(train, state)
    return tree["w"], dynamic.select(jc.merge(train, held), plan)["w"], float(first), float(loss(train, held))


@pytest.mark.parametrize("signs", [False, True])
def test_weights_stay_bit_for_bit_while_scores_learn(signs):
    before, after, first, last = trained(dynamic.EdgePopup(sparsity=0.6, signs=signs))
    np.testing.assert_array_equal(np.asarray(after.weights.bits), np.asarray(before.weights.bits))
    assert bool((after.scores != before.scores).all())
    assert last < first
    assert int(after.mask.sum()) == int(before.mask.sum()) == 48 - 29
    assert float(after.scores[after.mask].min()) >= float(after.scores[~after.mask].max())


def test_a_swapped_edge_lowers_the_loss_to_first_order():
    w, g = array(), array(seed=1)
    plan, tree = compressed(dynamic.EdgePopup(sparsity=0.5), w)
    node = tree["w"]
    moved = dataclasses.replace(node, scores=node.scores - 0.05 * pulled(node, g).scores)
    after = dynamic.select({"w": moved}, plan)["w"]
    entered, left = after.mask & ~node.mask, node.mask & ~after.mask
    assert int(entered.sum()) == int(left.sum()) > 0
    # Every score that overtook another fell less: its part of the gradient is the smaller.
    assert float((g * w)[entered].max()) < float((g * w)[left].max())
    assert float(jnp.sum(g * after.materialize())) < float(jnp.sum(g * node.materialize()))


@pytest.mark.parametrize("signs", [False, True])
def test_an_edge_that_harms_falls_out_whatever_the_sign_of_its_score(signs):
    w, g = jnp.ones((2, 2)), jnp.array([[1.0, 1.0], [-1.0, -1.0]])
    plan, tree = compressed(dynamic.EdgePopup(sparsity=0.5, signs=signs), w)
    for scores in ([[0.3, -0.9], [0.2, -0.1]], [[-0.9, -0.8], [-0.1, -0.2]]):
        node = dataclasses.replace(tree["w"], scores=jnp.array(scores))
        moved = dataclasses.replace(node, scores=node.scores - 2 * pulled(node, g).scores)
        assert dynamic.select({"w": moved}, plan)["w"].mask.tolist() == [[False, False], [True, True]]


def whole(method, scales=(0.3, 3.0, 0.1)):
    """Three leaves under one rule, their scores drawn at these scales."""
    params = {name: array(seed=i) for i, name in enumerate("abc")}
    plan = jc.plan(params, [(".*", method)])
    tree = jc.compress(params, plan, step=0, key=KEY)
    drawn = {name: scale * array(seed=10 + i) for i, (name, scale) in enumerate(zip("abc", scales, strict=True))}
    return plan, {name: dataclasses.replace(node, scores=drawn[name]) for name, node in tree.items()}


@pytest.mark.parametrize(
    "method",
    [
        dynamic.EdgePopup(0.7, scope="global"),
        dynamic.EdgePopup(0.7, signs=True, scope="global"),
        dynamic.Movement(0.7, scope="global"),
    ],
    ids=repr,
)
def test_a_global_scope_has_one_threshold_for_all_leaves(method):
    plan, tree = whole(method)
    after = jax.jit(lambda tree: dynamic.select(tree, plan))(tree)
    flat = np.sort(np.concatenate([np.ravel(x.scores) for x in tree.values()]))
    limit = flat[round(0.7 * 144)]
    for name, node in after.items():
        np.testing.assert_array_equal(np.asarray(node.mask), np.asarray(tree[name].scores) >= limit)
    kept = [int(node.mask.sum()) for node in after.values()]
    assert sum(kept) == 144 - round(0.7 * 144)
    assert kept[1] > kept[0] > kept[2]
    if getattr(method, "signs", False):
        for name, node in after.items():
            size = float(jnp.abs(array(seed="abc".index(name)))[node.mask].mean()) if node.mask.any() else 0.0
            found = np.abs(np.asarray(node.materialize()))
            np.testing.assert_allclose(found, size * np.asarray(node.mask), rtol=1e-6)


def test_a_global_scope_follows_its_schedule_and_begins_so():
    ramp = optax.linear_schedule(0.0, 0.9, 3)
    plan, tree = whole(dynamic.EdgePopup(ramp, scope="global"))
    selected = jax.jit(lambda tree, step: dynamic.select(tree, plan, step))
    for step in range(5):
        kept = sum(int(x.mask.sum()) for x in selected(tree, step).values())
        assert kept == 144 - round(144 * float(ramp(step)))
    assert selected._cache_size() == 1
    first = jc.compress({"a": array(), "b": 9 * array((4, 2))}, jc.plan({"a": array(), "b": array((4, 2))}, [
        (".*", dynamic.EdgePopup(0.5, scope="global"))
    ]), key=KEY)  # fmt: skip
    scores = np.concatenate([np.ravel(first[name].scores) for name in "ab"])
    masks = np.concatenate([np.ravel(first[name].mask) for name in "ab"])
    assert masks.sum() == 28 and scores[masks].min() > scores[~masks].max()


def test_stacked_layers_share_a_threshold_with_the_same_layer_of_other_leaves():
    params = {"a": array((2, 8, 6)), "b": array((2, 4, 3), seed=1)}
    plan = jc.plan(params, [(".*", jc.stacked(dynamic.Movement(0.5, scope="global")))])
    tree = jc.compress(params, plan)
    drawn = {name: dataclasses.replace(x, scores=array(x.scores.shape, seed=7)) for name, x in tree.items()}
    after = dynamic.select(drawn, plan)
    for i in range(2):
        scores = np.concatenate([np.ravel(drawn[name].scores[i]) for name in "ab"])
        masks = np.concatenate([np.ravel(after[name].mask[i]) for name in "ab"])
        assert masks.sum() == 30 and scores[masks].min() > scores[~masks].max()


def test_rules_of_the_same_method_have_thresholds_of_their_own():
    params, method = {"a": array(), "b": array(seed=1)}, dynamic.Movement(0.5, scope="global")
    plan = jc.plan(params, [("a", method), ("b", method)])
    after = dynamic.select(jc.compress(params, plan), plan)
    assert [int(x.mask.sum()) for x in after.values()] == [24, 24]


def binary_mlp(params, x):
    """A network of one-bit weights and activations, but for its input and output."""
    h = jc.quantize.training.sign_ste(x @ params["a"])
    h = jc.quantize.training.sign_ste(h @ params["b"])
    return h @ params["c"], h


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_multi_prize_tickets_of_one_bit_beat_random_masks_of_the_same_density(scope, rng):
    """MPT-1/1: only scores learn, weights are +-alpha or 0, activations +-1."""
    x = jnp.asarray(rng.normal(size=(128, 8)), jnp.float32)
    y = jnp.sign(x[:, :1] * x[:, 1:2])
    sizes = {"a": (8, 64), "b": (64, 64), "c": (64, 1)}
    params = {name: array(size, seed=i) / size[0] ** 0.5 for i, (name, size) in enumerate(sizes.items())}
    ramp = optax.linear_schedule(0.0, 0.5, 60)
    plan = jc.plan(params, [(".*", dynamic.EdgePopup(sparsity=ramp, signs=True, scope=scope))])
    tree = jc.compress(params, plan, key=KEY)
    train, held = jc.split(tree)
    tx = optax.adam(0.01)

    def loss(tree):
        return jnp.mean((binary_mlp(jc.materialize(tree), x)[0] - y) ** 2)

    def step(carry, t):
        train, state = carry
        grads = jax.grad(lambda train: loss(dynamic.select(jc.merge(train, held), plan, t)))(train)
        updates, state = tx.update(grads, state, train)
        return (optax.apply_updates(train, updates), state), None

    train = jax.jit(lambda train: jax.lax.scan(step, (train, tx.init(train)), jnp.arange(200))[0][0])(train)
    ticket = dynamic.select(jc.merge(train, held), plan, 200)
    total = sum(x.mask.size for x in ticket.values())
    assert abs(sum(int(x.mask.sum()) for x in ticket.values()) - total / 2) <= 1
    for name, node in ticket.items():
        np.testing.assert_array_equal(np.asarray(node.weights.bits), np.asarray(tree[name].weights.bits))
        dense = np.asarray(node.materialize())
        assert len(np.unique(np.abs(dense[np.asarray(node.mask)]))) == 1
    assert np.unique(binary_mlp(jc.materialize(ticket), x)[1]).tolist() == [-1.0, 1.0]

    def control(key):
        masks = {n: jax.random.permutation(jax.random.fold_in(key, i), m.mask.ravel()).reshape(m.mask.shape)
                 for i, (n, m) in enumerate(ticket.items())}  # fmt: skip
        return loss({name: node.choose(masks[name]) for name, node in ticket.items()})

    controls = jax.jit(jax.vmap(control))(jax.random.split(KEY, 20))
    assert float(loss(ticket)) < 0.7 * float(controls.min())


def test_multi_prize_tickets_have_three_values_and_alpha():
    _, after, _, _ = trained(dynamic.EdgePopup(sparsity=0.6, signs=True))
    w, mask = np.asarray(after.weights.materialize()), np.asarray(after.mask)
    alpha = np.abs(w * mask).sum() / mask.sum()
    dense = np.asarray(after.materialize())
    np.testing.assert_allclose(dense, alpha * mask * np.sign(w), rtol=1e-6)
    assert len(np.unique(dense)) == 3
    stored = jc.finalize({"w": after})["w"]
    assert stored.values.bits == 1
    # The mask, one bit a kept weight, and the scale: no scores are stored.
    assert stored.nbits() == packing.mask_code(mask).nbits + mask.sum() + 32
    np.testing.assert_array_equal(np.asarray(stored.materialize()), dense)


def test_stacked_layers_choose_and_scale_apart():
    w = jnp.stack([array(), 10 * array(seed=1)])
    plan, tree = compressed(jc.stacked(dynamic.EdgePopup(0.5, signs=True)), w)
    again = dynamic.select({"w": dataclasses.replace(tree["w"], scores=tree["w"].scores + 0.1)}, plan)["w"]
    assert again.mask.sum((1, 2)).tolist() == [24, 24]
    for i in range(2):
        kept = jnp.abs(w[i])[again.mask[i]]
        np.testing.assert_allclose(np.unique(jnp.abs(again.materialize()[i]))[1], float(kept.mean()), rtol=1e-6)


def test_movement_scores_accumulate_minus_rate_gradient_weight():
    ramp = optax.polynomial_schedule(0.0, 0.75, power=3, transition_steps=4)
    plan, tree = compressed(dynamic.Movement(sparsity=ramp))
    expected, node, g, rate = np.zeros((8, 6)), tree["w"], array(seed=1), 0.1
    for t in range(6):
        node = dynamic.select({"w": node}, plan, t)["w"]
        assert int((~node.mask).sum()) == round(48 * float(ramp(t)))
        found = pulled(node, g)
        expected = expected - rate * np.asarray(g * node.weights)
        node = dataclasses.replace(
            node, scores=node.scores - rate * found.scores, weights=node.weights - rate * found.weights
        )
    np.testing.assert_allclose(np.asarray(node.scores), expected, rtol=2e-5, atol=1e-7)


def test_movement_keeps_what_grows_where_magnitude_keeps_what_is_large():
    w, target = jnp.array([3.0, 2.5, 0.3, 0.2]), jnp.array([0.0, 0.0, 1.5, -1.5])
    w = w * jnp.sign(jnp.where(target == 0, 1.0, target))
    _, tree = compressed(dynamic.Movement(threshold=-100.0), w)
    node = tree["w"]
    for _ in range(10):
        found = pulled(node, node.materialize() - target)
        node = dataclasses.replace(
            node, scores=node.scores - 0.03 * found.scores, weights=node.weights - 0.03 * found.weights
        )
    (hard,) = dynamic.Movement(sparsity=0.5).masks([node.scores])
    assert hard.tolist() == [False, False, True, True]
    assert jc.prune.Magnitude(sparsity=0.5)(node.weights).mask.tolist() == [True, True, False, False]


def test_soft_movement_prunes_under_its_penalty():
    plan, tree = compressed(dynamic.Movement(threshold=-0.05))
    train, held = jc.split(tree)
    gradient = jax.grad(lambda t: dynamic.score_penalty(jc.merge(t, held)))(train)["w"].scores
    np.testing.assert_allclose(np.asarray(gradient), 0.25)
    moved = dataclasses.replace(tree["w"], scores=-0.3 * gradient)
    assert bool(tree["w"].mask.all())
    assert not bool(dynamic.select({"w": moved}, plan)["w"].mask.any())


def test_two_tasks_share_the_weights_of_piggyback():
    w, goals = array(), [array(seed=1), array(seed=2)]
    ends = []
    for goal in goals:
        plan, tree = compressed(dynamic.Piggyback(), w)
        node = tree["w"]
        np.testing.assert_array_equal(np.asarray(node.materialize()), np.asarray(w))
        for _ in range(30):
            node = dataclasses.replace(node, scores=node.scores - 1e-3 * pulled(node, node.materialize() - goal).scores)
            node = dynamic.select({"w": node}, plan)["w"]
        ends.append(node)
    assert bool((ends[0].mask != ends[1].mask).any())
    for node, goal in zip(ends, goals, strict=True):
        np.testing.assert_array_equal(np.asarray(node.weights.materialize()), np.asarray(w))
        np.testing.assert_array_equal(np.asarray(node.mask), np.asarray(node.scores >= 5e-3))
        assert float(jnp.sum((node.materialize() - goal) ** 2)) < float(jnp.sum((w - goal) ** 2))


def test_refitting_chooses_the_scores_of_the_best_mask():
    w, target = array((3, 2)), array((3, 2), seed=5)
    _, tree = compressed(dynamic.EdgePopup(sparsity=0.5), w)
    node = tree["w"].project(target)
    order = np.argsort(-np.asarray(node.scores).ravel())[:3]
    masks = [[(i >> k) & 1 for k in range(6)] for i in range(64) if bin(i).count("1") == 3]
    errors = [float(jnp.sum((target - jnp.array(m).reshape(3, 2) * w) ** 2)) for m in masks]
    assert sorted(order.tolist()) == [k for k in range(6) if masks[int(np.argmin(errors))][k]]


def test_soft_thresholds_have_the_right_gradient():
    w = jnp.array([[2.0, -0.1], [-1.5, 0.4]])
    node, g = dynamic.STR(initial=0.2)(w), array((2, 2))
    level = 1 / (1 + np.exp(-0.2))
    np.testing.assert_allclose(np.asarray(node.materialize()), np.sign(w) * np.maximum(np.abs(w) - level, 0), rtol=1e-6)
    found, above = pulled(node, g), np.abs(w) > level
    np.testing.assert_allclose(np.asarray(found.weights), np.where(above, g, 0), rtol=1e-6)
    expected = -(np.asarray(g) * np.sign(w) * above).sum() * level * (1 - level)
    assert float(found.logit) == pytest.approx(expected, rel=1e-5)

    def value(logit):
        return float(jnp.sum(g * dataclasses.replace(node, logit=logit).materialize()))

    assert float(found.logit) == pytest.approx((value(jnp.float32(0.21)) - value(jnp.float32(0.19))) / 0.02, rel=1e-2)
    stored = jc.finalize(node)
    np.testing.assert_array_equal(np.asarray(stored.mask), above)
    np.testing.assert_array_equal(np.asarray(stored.materialize()), np.asarray(node.materialize()))


def test_weight_decay_on_the_threshold_sparsifies():
    _, tree = compressed(dynamic.STR(initial=-4.0))
    train, tx = jc.split(tree)[0], optax.sgd(0.1)
    held, state = jc.split(tree)[1], None
    state = tx.init(train)
    for _ in range(40):
        gradient = jax.grad(lambda t: 0.05 * jnp.sum(t["w"].logit ** 2))(train)
        updates, state = tx.update(gradient, state)
        train = optax.apply_updates(train, updates)
    before, after = (int((x["w"].materialize() != 0).sum()) for x in (tree, jc.merge(train, held)))
    assert after < before


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="Movement: found sparsity=None, threshold=None"):
        dynamic.Movement()
    with pytest.raises(ValueError, match=r"EdgePopup: sparsity=1.5 is outside \[0, 1\]"):
        dynamic.EdgePopup(sparsity=1.5)
    for method in (dynamic.EdgePopup, dynamic.Movement):
        with pytest.raises(ValueError, match="scope='output' is unknown; use 'leaf' or 'global'"):
            method(sparsity=0.5, scope="output")
    with pytest.raises(ValueError, match="w: EdgePopup needs 'key'"):
        jc.compress({"w": array()}, jc.plan({"w": array()}, [("w", dynamic.EdgePopup(sparsity=0.5))]))
    _, tree = compressed(dynamic.Movement(sparsity=0.5))
    with pytest.raises(ValueError, match=r"w: found Magnitude.* for a Scored node"):
        dynamic.select(tree, jc.plan({"w": array()}, [("w", jc.prune.Magnitude(sparsity=0.5))]))


def test_asap_cuts_alternatives_as_they_cool_and_leaves_the_best():
    hurts = {"a": jnp.array([0.3, 0.1, 0.9, 0.5]), "b": jnp.array([[1.0, 2.0], [2.0, 1.0]])}
    logits = jax.tree.map(jnp.zeros_like, hurts)
    cooling, threshold = optax.exponential_decay(1.0, 10, 0.7), optax.linear_schedule(0.1, 0.4, 60)
    tx = dynamic.asap(optax.adam(0.05), cooling, threshold, grace=20, every=2)
    state = tx.init(logits)

    @jax.jit
    def step(logits, state):
        def loss(x):
            found = dynamic.gates(x, state, cooling)
            return sum(jax.tree.leaves(jax.tree.map(lambda p, h: (p * h).sum(), found, hurts)))

        updates, state = tx.update(jax.grad(loss)(logits), state, logits)
        return optax.apply_updates(logits, updates), state

    left = []
    for i in range(120):
        before, old = logits, state.masks
        logits, state = step(logits, state)
        found = dynamic.gates(logits, state, cooling)
        for path, mask in state.masks.items():
            gate = np.asarray(found[path])
            assert not bool((mask & ~old[path]).any())  # for good
            assert bool(mask.any(-1).all())
            np.testing.assert_array_equal(gate == 0, ~np.asarray(mask))
            np.testing.assert_allclose(gate.sum(-1), 1, rtol=1e-6)
            np.testing.assert_array_equal(np.asarray(logits[path])[~old[path]], np.asarray(before[path])[~old[path]])
        left.append(sum(int(mask.sum()) for mask in state.masks.values()))
        if i < 20 or i % 2 == 1:
            assert left[-1] == (8 if i < 20 else left[-2])
    assert left[-1] == 3
    assert int(jnp.argmax(state.masks["a"])) == 1
    assert state.masks["b"].tolist() == [[True, False], [False, True]]
    assert dynamic.masks_of((optax.EmptyState(), state)).keys() == state.masks.keys()
    with pytest.raises(ValueError, match="every=0"):
        dynamic.asap(optax.sgd(0.1), 1.0, 0.1, every=0)
    with pytest.raises(ValueError, match="asap needs the parameters"):
        tx.update(logits, state)
