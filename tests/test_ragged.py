"""Products whose rows are in groups, each with a kernel of its own: calibration, costs and execution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jcompress as jc

PARAMS = {
    name: jax.random.normal(jax.random.key(i), shape) * 0.3
    for i, (name, shape) in enumerate({"router": (8, 4), "up": (4, 8, 6), "down": (4, 6, 8)}.items())
}
X = jax.random.normal(jax.random.key(9), (32, 8))


def routed(p, x):
    expert = jnp.argmax(x @ p["router"], -1)
    order, sizes = jnp.argsort(expert), jnp.bincount(expert, length=4)
    h = jnp.tanh(lax.ragged_dot(x[order], p["up"], sizes))
    return jnp.zeros_like(x).at[order].set(lax.ragged_dot(h, p["down"], sizes))


def by_hand(p, x):
    """What each expert meets, as it would in a loop over experts."""
    expert = np.asarray(jnp.argmax(x @ p["router"], -1))
    up = [np.asarray(x, np.float64)[expert == e] for e in range(4)]
    down = [np.tanh(rows @ np.asarray(p["up"][e], np.float64)) for e, rows in enumerate(up)]
    return up, down


def test_each_expert_has_statistics_of_the_rows_routed_to_it():
    stats = jax.jit(lambda p, x: jc.trace.observe(routed, p, x)[1])(PARAMS, X)
    for name, rows in zip(("up", "down"), by_hand(PARAMS, X), strict=True):
        found = stats[name]
        assert found.gram.shape == (4, *[PARAMS[name].shape[1]] * 2)
        assert found.count.tolist() == [len(r) for r in rows]
        for e, r in enumerate(rows):
            y = r @ np.asarray(PARAMS[name][e], np.float64)
            np.testing.assert_allclose(found.gram[e], r.T @ r, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(found.sum[e], r.sum(0), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(found.absmax[e], np.abs(r).max(0, initial=0), rtol=1e-4)
            np.testing.assert_allclose(found.outputs.square[e], (y**2).sum(0), rtol=1e-4, atol=1e-4)
        assert found.layout == jc.Layout(inputs=1, outputs=2, batch=0)


def test_an_expert_without_rows_and_rows_without_an_expert():
    sizes = jnp.array([3, 0, 2])
    p, x = {"w": jnp.ones((3, 4, 2))}, jnp.arange(28.0).reshape(7, 4) + 1
    found = jc.trace.observe(lambda p, x: lax.ragged_dot(x, p["w"], sizes), p, x)[1]["w"]
    assert found.count.tolist() == [3, 0, 2]
    np.testing.assert_allclose(found.gram[0], x[:3].T @ x[:3], rtol=1e-6)
    assert not found.gram[1].any()
    np.testing.assert_allclose(found.gram[2], x[3:5].T @ x[3:5], rtol=1e-6)


def test_kernels_laid_out_otherwise_and_stacked_for_scan():
    sizes = jnp.array([3, 4])
    p, x = {"w": jax.random.normal(jax.random.key(0), (3, 2, 5, 5))}, jax.random.normal(jax.random.key(1), (7, 5))

    def fn(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(lax.ragged_dot(h, w.swapaxes(1, 2), sizes)), None), x, p["w"])[0]

    found = jc.trace.observe(fn, p, x)[1]["w"]
    assert found.layout == jc.Layout(inputs=3, outputs=2, batch=(0, 1)) == jc.trace.layout(fn, p, x)["w"]
    assert found.gram.shape == (3, 2, 5, 5) and found.count.tolist() == [[3, 4]] * 3
    for i in range(3):
        np.testing.assert_allclose(found.gram[i, 0], x[:3].T @ x[:3], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.gram[i, 1], x[3:].T @ x[3:], rtol=1e-5, atol=1e-5)
        x = lax.ragged_dot(x, p["w"][i].swapaxes(1, 2), sizes)
        x = jnp.tanh(x)


@pytest.mark.parametrize(
    "method", [jc.quantize.Int(bits=8), jc.quantize.Int(bits=8, axis=-1), jc.factorize.SVD(rank=2)]
)
def test_execution_reports_it_and_gives_what_dense_kernels_give(method):
    tree = jc.compress(PARAMS, jc.plan(PARAMS, [("up|down", method), (".*", None)]))
    fast = jc.accelerate(routed)
    np.testing.assert_allclose(fast(tree, X), routed(jc.materialize(tree), X), rtol=1e-5, atol=1e-5)
    rows = {row.path: row for row in fast.report(tree, X).rows}
    assert list(rows) == ["router", "up", "down"]
    assert rows["up"].primitive == "ragged_dot_general" and rows["up"].how.startswith("dense: its rows are in groups")


def test_each_row_is_multiplied_by_one_expert():
    rows = {row.path: row.multiply_adds for row in jc.trace.cost(routed, PARAMS, X).rows}
    assert rows == {"router": 32 * 8 * 4, "up": 32 * 8 * 6, "down": 32 * 6 * 8}
    assert jc.trace.cost(routed, PARAMS, X).notes == ()


def test_products_in_the_backward_pass_are_counted_once_a_row():
    def update(p, x):
        return jax.grad(lambda w: lax.ragged_dot(x, w, jnp.array([3, 4])).sum())(p["w"])

    cost = jc.trace.cost(update, {"w": jnp.ones((2, 5, 6))}, jnp.ones((7, 5)))
    # The kernel's gradient alone: what the product itself gives is not needed for it.
    assert cost.total.multiply_adds in (7 * 5 * 6, 2 * 7 * 5 * 6)


def test_gptq_takes_each_expert_by_its_own_rows():
    plan = jc.plan(PARAMS, [("up", jc.quantize.GPTQ(bits=4)), (".*", None)])
    stats = jc.calibrate(routed, PARAMS, [X], plan=plan)
    small = jc.materialize(jc.compress(PARAMS, plan, stats=stats))["up"]
    for e in range(4):
        one = {"w": PARAMS["up"][e]}
        alone = jc.plan(one, [("w", jc.quantize.GPTQ(bits=4))])
        seen = jc.calibrate(lambda p, x: x @ p["w"], one, [jnp.asarray(by_hand(PARAMS, X)[0][e], jnp.float32)], alone)
        np.testing.assert_allclose(small[e], jc.materialize(jc.compress(one, alone, stats=seen))["w"], atol=1e-5)
