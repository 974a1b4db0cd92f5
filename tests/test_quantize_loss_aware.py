"""Training that minds what quantization does to the loss, and compositions that papers have names for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rows import statistics

import jcompress as jc
from jcompress.quantize.training import elq, loss_scaled

Q, M = jc.quantize, jc.prune.Magnitude


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


# Explicit loss-error-aware quantization


@pytest.mark.parametrize("sign", [1, -1])
def test_the_gradient_is_that_of_its_formula_on_either_side(sign, rng):
    x, params = normal(rng, 5), {"w": normal(rng, 5)}
    held = {"w": params["w"] + sign * 0.3 * x}

    def loss(p):
        return jnp.sum(x * p["w"]) ** 2 + 100 * jnp.sum(x * p["w"])

    w, q, x = (np.asarray(v, np.float64) for v in (params["w"], held["w"], x))
    moved, slopes = loss(held) - loss(params), [(2 * x @ v + 100) * x for v in (w, q)]
    assert np.sign(moved) == sign
    value, gradient = jax.value_and_grad(lambda p: elq(loss, p, held, 0.5, 0.25))(params)
    np.testing.assert_allclose(value, loss(params) + 0.5 * abs(moved) + 0.25 * ((w - q) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient["w"], slopes[0] * (1 - 0.5 * sign) + 0.5 * (w - q), rtol=1e-4)
    shift = jax.lax.stop_gradient(held["w"] - params["w"])
    through = jax.grad(lambda p: elq(loss, p, {"w": p["w"] + shift}, 0.5, 0.25))(params)["w"]
    want = slopes[0] + 0.5 * sign * (slopes[1] - slopes[0]) + 0.5 * (w - q)
    np.testing.assert_allclose(through, want, rtol=1e-4)
    assert float(elq(loss, held, held, 0.5, 0.25)) == float(loss(held))


EVERY, PARTS = 60, (0.5, 0.75, 0.875, 1.0)


@jax.jit
def incremental(x, y, start, perturbation, error):
    """Incremental quantization to 0 and powers of two: weights and losses before and after each step."""
    grid = Q.PowersOfTwo(bits=3)
    later = {i * EVERY: PARTS[i] / PARTS[i - 1] for i in (1, 2, 3)}
    free = M(optax.piecewise_constant_schedule(PARTS[0], later))
    plan, whole = (jc.plan(start, [("w", m)]) for m in (Q.INQ(free, grid), grid))
    tx = optax.chain(optax.adam(0.01), jc.project(plan, every=EVERY))

    def loss(p):
        return jnp.square(jnp.tanh(x @ p["w"]) - y).mean()

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: elq(loss, p, jc.simulate(p, whole), perturbation, error))(params)
        updates, state = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates)
        return (new, state), (new["w"], loss(params), loss(new))

    dense = jax.lax.fori_loop(0, 200, lambda _, p: jax.tree.map(lambda w, g: w - g, p, jax.grad(loss)(p)), start)
    return jax.lax.scan(step, (dense, tx.init(dense)), None, 3 * EVERY + 1)[1]


def test_parts_are_frozen_in_turn_and_the_loss_moves_less():
    """With the two terms and without them: what freezing adds to the loss, and the loss at last, over three draws."""
    found = {(0.0, 0.0): [], (0.5, 0.01): []}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x = normal(rng, 256, 16) @ normal(rng, 16, 16) / 4
        y, start = jnp.tanh(x @ normal(rng, 16, 16) / 4), {"w": normal(rng, 16, 16) / 4}
        for strengths, row in found.items():
            w, before, after = map(np.asarray, incremental(x, y, start, *strengths))
            for i, part in enumerate(PARTS[:-1]):
                assert (w[i * EVERY] == w[-1]).sum() >= round(part * 256)
            levels = np.abs(w[-1])
            assert (np.log2(levels[levels > 0]) % 1 == 0).all()
            row.append([(after - before)[EVERY::EVERY].sum(), after[-1]])
    (moved, last), (less, lower) = (np.mean(row, axis=0) for row in found.values())
    assert 0 < less < 0.8 * moved
    assert lower < last


def test_what_is_wrong_is_said():
    params = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="perturbation=-1 and error=0 must not be negative"):
        elq(lambda p: p["w"].sum(), params, params, -1, 0)
    with pytest.raises(ValueError, match=r"found quantized parameters of shapes {'w': \(2,\)}"):
        elq(lambda p: p["w"].sum(), params, {"w": jnp.ones(2)}, 1, 1)
    with pytest.raises(ValueError, match=r"start=0\.5"):
        loss_scaled(optax.sgd(1.0), start=0.5)
    with pytest.raises(ValueError, match="threshold=-1 must not be negative"):
        Q.GPFQ(4, threshold=-1)


# Mixed precision


def test_small_gradients_survive_in_16_bits_and_add_up_in_the_master_copy():
    params = {"w": jnp.array([1.0])}
    tx = loss_scaled(optax.sgd(1.0), start=2.0**15)

    def loss(p):
        return (p["w"].astype(jnp.float16) * jnp.float16(2.0**-12) * jnp.float16(2.0**-13)).astype(jnp.float32).sum()

    assert jax.grad(loss)(params)["w"] == 0

    def step(params, state):  # operation by operation: compiled, the two constants would be one that vanishes
        grads = jax.grad(lambda p: state.scale * loss(p))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    first, _ = step(params, tx.init(params))
    assert first["w"] == 1.0  # 2**-25 is below half a unit of 1.0 in float32 too
    params = {"w": jnp.array([2.0**-10])}
    state = tx.init(params)
    for _ in range(8):
        params, state = step(params, state)
    assert params["w"] == 2.0**-10 - 8 * 2.0**-25


def test_an_overflow_skips_the_step_and_lowers_the_scale(rng):
    params = {"a": normal(rng, 4), "b": normal(rng, 3)}
    tx = loss_scaled(optax.adam(0.1), start=16.0, factor=4.0, patience=3)
    update = jax.jit(tx.update)
    good = jax.tree.map(lambda x: 16 * jnp.sin(x), params)
    bad = {**good, "b": good["b"].at[1].set(jnp.nan)}
    plain = optax.adam(0.1)
    want, inner = plain.update(jax.tree.map(jnp.sin, params), plain.init(params), params)
    found, state = update(good, tx.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), (found, state.inner), (want, inner))
    skipped, after = update(bad, state, params)
    assert not any(x.any() for x in jax.tree.leaves(skipped))
    jax.tree.map(np.testing.assert_array_equal, after.inner, state.inner)
    assert after.scale == 4 and after.steps == 0
    for scale in (4, 4, 16, 16):
        _, after = update(good, after, params)
        assert after.scale == scale
    for scale in (4, 1, 1):
        _, after = update(bad, after, params)
        assert after.scale == scale


# Compositions


def test_pruning_ternary_quantization_keeps_three_values_under_the_best_scale(rng):
    w = normal(rng, 64, 32)
    node = jc.chain(M(sparsity=0.8), Q.Int(bits=1, axis=None))(w)
    dense, kept = np.asarray(node.materialize(), np.float64), np.asarray(node.mask)
    assert len(np.unique(dense)) == 3 and kept.sum() == round(0.2 * w.size)
    t = np.sign(np.asarray(w, np.float64)) * kept
    np.testing.assert_allclose(node.values.scale, (np.asarray(w) * t).sum() / (t * t).sum(), rtol=1e-5)
    entropy = -(0.2 * np.log2(0.2) + 0.8 * np.log2(0.8)) * w.size
    assert entropy <= node.nbits() - kept.sum() - 32 <= 1.3 * entropy  # the mask, in the cheapest of its codes
    gradient = jax.grad(lambda v: (jc.simulate({"w": v}, jc.plan({"w": v}, [("w", M(0.8))]))["w"] * w).sum())(w)
    np.testing.assert_array_equal(gradient, w)


SPARSE = jc.chain(M(sparsity=0.98), Q.Float("float16"))
APART = {
    "SpQR": (jc.residual(SPARSE, jc.chain(Q.GPTQ(3, 16), Q.Int(8))), Q.GPTQ(3, 16), 3 * 64 * 32 + 8 * 4 * 32 + 32 * 32),
    "dense-and-sparse": (jc.residual(SPARSE, jc.share.KMeans(8)), jc.share.KMeans(8), 3 * 64 * 32 + 32 * 8),
    "value-aware": (jc.residual(SPARSE, Q.Int(3, axis=None)), Q.Int(3, axis=None), 3 * 64 * 32 + 32),
}


@pytest.mark.parametrize("name", APART)
def test_outliers_apart_cost_what_is_counted_and_pay(name, rng):
    """SpQR (arXiv:2306.03078), SqueezeLLM (arXiv:2306.07629), value-aware quantization (arXiv:1804.07802)."""
    method, alone, bulk = APART[name]
    w = jnp.asarray(rng.standard_t(2, size=(64, 32)), jnp.float32)
    stats = statistics((64, 32))
    x = jnp.linalg.cholesky(stats.gram).T
    node, other = (jax.jit(lambda w, m=m: m(w, jc.Context(stats=stats)))(w) for m in (method, alone))
    sparse = node.terms[0]
    kept = round(0.02 * w.size)
    assert int(sparse.mask.sum()) == kept
    index = sparse.nbits() - 16 * kept
    assert 0 < index < w.size
    assert node.nbits() == bulk + 16 * kept + index
    errors = [float(jnp.square(x @ (n.materialize() - w)).sum()) for n in (node, other)]
    assert errors[0] < 0.5 * errors[1]


def test_path_following_may_leave_more_zeros(rng):
    w = normal(rng, 64, 16)
    context = jc.Context(stats=statistics((64, 16)))
    gram = np.asarray(context.stats.gram, np.float64)
    nodes = [jax.jit(lambda w, t: Q.GPFQ(3, threshold=t)(w, context))(w, t) for t in (0.0, 0.4, 0.8)]
    zeros = [float((n.codes == 0).mean()) for n in nodes]
    assert zeros[0] < zeros[1] < zeros[2]
    scale, u, dense = np.asarray(nodes[1].scale[0], np.float64), np.zeros((64, 16)), np.asarray(w, np.float64)
    for t in range(64):  # u holds what the inputs before left over
        z = dense[t] + gram[t] @ u / gram[t, t]
        z = np.sign(z) * np.maximum(np.abs(z) - 0.4 * scale, 0)
        q = scale * np.clip(np.round(z / scale), -3, 3)
        u[t] = dense[t] - q
    np.testing.assert_allclose(dense - u, nodes[1].materialize(), atol=1e-4)


def test_ranks_of_corrections_share_a_budget(rng):
    """As CoRa searches them (arXiv:2408.00923), here exactly: one rank for each layer, a part of all bits."""
    params = {"flat": normal(rng, 32, 32), "steep": normal(rng, 32, 32)}
    params["steep"] = params["steep"] + 20 * jnp.outer(normal(rng, 32), normal(rng, 32))
    names = {0: Q.Int(2), **{r: jc.residual(Q.Int(2), jc.factorize.SVD(rank=r)) for r in (1, 2, 4)}}
    plans = {str(r): jc.plan(params, [(".*", m)]) for r, m in names.items()}
    bits = {r: jc.nbits(jc.compress(params, plan)) for r, plan in plans.items()}
    plan = jc.budget.mixed(params, plans, budget=bits["2"], measure="weight")
    small = jc.compress(params, plan)
    assert jc.nbits(small) <= bits["2"]

    def error(tree):
        return sum(float(jnp.square(a - b).sum()) for a, b in zip(*map(jax.tree.leaves, (tree, params)), strict=True))

    assert error(jc.materialize(small)) <= error(jc.materialize(jc.compress(params, plans["2"])))
    left = np.linalg.svd(np.asarray(params["steep"] - Q.Int(2)(params["steep"]).materialize(), np.float64))[1]
    rank = small["steep"].terms[1].u.shape[-1]
    found = float(jnp.square(small["steep"].materialize() - params["steep"]).sum())
    np.testing.assert_allclose(found, (left[rank:] ** 2).sum(), rtol=1e-3)
