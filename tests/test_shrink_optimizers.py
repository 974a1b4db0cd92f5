"""What an optimizer holds goes with the parameters that are cut, or is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape) * 0.1, jnp.float32)


PARAMS = {"a": draw(6, 12), "bias": draw(12), "b": draw(12, 9), "c": draw(9, 4)}
X = draw(8, 6)


def fn(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"] + p["bias"]) @ p["b"]) @ p["c"]


KEEP = {"a[1]": np.arange(12) % 3 > 0, "b[1]": np.arange(9) % 2 > 0}
SMALL, CUT = jc.shrink(fn, PARAMS, KEEP, X)


def trained(tx, params=PARAMS, steps=3):
    @jax.jit
    def step(state, i):
        return tx.update(jax.tree.map(lambda p: jnp.cos(7 * p + i), params), state, params)[1]

    state = jax.jit(tx.init)(params)
    for i in range(steps):
        state = step(state, i)
    return state


def labels(params):
    return {name: "one" if name in "ab" else "two" for name in params}


ENTRYWISE = {
    "adam": optax.adam(1e-3),
    "lion, averaged": optax.chain(optax.lion(1e-3), optax.ema(0.9)),
    "sm3": optax.sm3(1e-3),
    "flatten": optax.flatten(optax.adam(1e-3)),
    "masked": optax.masked(optax.adam(1e-3), {"a": True, "bias": False, "b": True, "c": False}),
    "masked sm3": optax.masked(optax.sm3(1e-3), {"a": True, "bias": True, "b": False, "c": True}),
    "multi transform": optax.multi_transform({"one": optax.adam(1e-3), "two": optax.sm3(1e-3)}, labels),
    "several steps": optax.MultiSteps(optax.adam(1e-3), 2),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    "factors of nothing so short": optax.adafactor(1e-3, multiply_by_parameter_scale=False, clipping_threshold=None),
    "schedule free": optax.contrib.schedule_free(optax.adam(1e-3), 1e-3),
}


@pytest.mark.parametrize("name", ENTRYWISE)
def test_the_next_step_is_the_part_of_the_full_one_that_stays(name):
    tx = ENTRYWISE[name]
    state = trained(tx)
    cut = SMALL.cut(state)
    expected, _ = jax.jit(tx.update)(PARAMS, state, PARAMS)
    found, after = jax.jit(tx.update)(CUT, cut, CUT)
    for a, b in zip(jax.tree.leaves(SMALL.cut(expected)), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-9)
    like = jax.eval_shape(tx.init, CUT)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, like)
    assert jax.tree.map(jnp.shape, SMALL.cut(state, like)) == jax.tree.map(jnp.shape, like)
    assert jax.tree.map(jnp.shape, SMALL.cut(jax.eval_shape(tx.init, PARAMS))) == jax.tree.map(jnp.shape, like)


def test_memories_and_populations_are_cut_behind_their_own_axis():
    state = optax.scale_by_lbfgs(memory_size=4).init(PARAMS)
    assert SMALL.cut(state).diff_params_memory["b"].shape == (4, 8, 4)
    assert SMALL.cut(state).weights_memory.shape == (4,)
    many = jax.vmap(optax.flatten(optax.adam(1e-3)).init)(jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS))
    assert SMALL.cut(many)[0].mu.shape == (2, sum(x.size for x in CUT.values()))


def test_means_that_are_kept_are_cut_where_only_one_axis_fits():
    found = SMALL.cut({"nu": {"a": jnp.arange(6.0), "b": jnp.arange(12.0)}, "scale": {"b": jnp.ones((1, 9))}})
    assert found["nu"]["a"].shape == (6,) and found["scale"]["b"].shape == (1, 4)
    assert found["nu"]["b"].tolist() == np.flatnonzero(KEEP["a[1]"]).tolist()


def test_the_optimizer_may_know_a_subtree():
    keep = {f"params/{name}": kept for name, kept in KEEP.items()}
    small, _ = jc.shrink(lambda v, x: fn(v["params"], x), {"params": PARAMS}, keep, X)
    for tx in (optax.adam(1e-3), optax.flatten(optax.adam(1e-3))):
        state = small.cut(trained(tx))
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, tx.init(CUT))


WIDE = {"a": draw(4, 24), "b": draw(24, 20), "c": draw(20, 3), "d": draw(3, 16, 22)}


def wide(p, x):
    h = jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]
    return jax.nn.relu(jnp.einsum("bk,kio->bio", h, p["d"])).sum((1, 2), keepdims=True)


def estimate(state, name, shape):
    (state,) = (s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "v_row")) if hasattr(s, "v_row"))
    if state.v[name].size > 1:
        return state.v[name]
    second, first = map(int, np.argsort(shape)[-2:])
    rows, columns = state.v_row[name], state.v_col[name]
    mean = rows.mean(second - (second > first), keepdims=True)
    return jnp.expand_dims(rows / mean, first) * jnp.expand_dims(columns, second)


@pytest.mark.parametrize("kept", [(22, 18, 15), (17, 18, 16), (24, 11, 22), (12, 9, 8)])
def test_estimates_of_second_moments_are_those_that_stay(kept):
    """Factored before; then factored the same way, the other way about, for one of the two, and for none."""
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=16)
    state = trained(tx, WIDE)
    groups = jc.trace.coupling(wide, WIDE, draw(5, 4))
    by_size = {g.size: n for n, g in groups.prunable.items()}
    keep = {by_size[n]: np.random.default_rng(n).permutation(n) < k for n, k in zip((24, 20), kept[:2], strict=True)}
    small, params = jc.shrink(wide, WIDE, keep, draw(5, 4))
    like = jax.eval_shape(tx.init, params)
    cut = small.cut(state, like)
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, like)
    for name in ("b", "d"):
        full = small.cut({name: estimate(state, name, WIDE[name].shape)})[name]
        np.testing.assert_allclose(estimate(cut, name, params[name].shape), full, rtol=1e-5)
    jax.eval_shape(tx.update, params, cut, params)


def test_factors_whose_optimizer_is_not_known_to_factor_again_are_named():
    state = trained(optax.adafactor(1e-3, min_dim_size_to_factor=16), WIDE)
    small, _ = jc.shrink(wide, WIDE, {"b[1]": np.arange(20) < 10}, draw(5, 4))
    with pytest.raises(ValueError, match=r"/b: found factors of shapes \(20,\) and \(24,\).*pass like=optimizer.init"):
        small.cut(state)


def test_what_cannot_be_placed_is_named():
    with pytest.raises(ValueError, match=r"left/b: found shape \(12, 12\), which goes with b of shape \(12, 9\)"):
        SMALL.cut({"left": {"b": jnp.eye(12)}})
    tx = optax.masked(optax.flatten(optax.adam(1e-3)), {"a": True, "bias": False, "b": True, "c": False})
    with pytest.raises(ValueError, match=r"mu: found shape \(180,\), as long as some parameters side by side"):
        SMALL.cut(tx.init(PARAMS))
    with pytest.raises(ValueError, match=r"a: found shape \(6, 8\) after the cut, expected \(6, 12\), as in like="):
        SMALL.cut({"a": PARAMS["a"]}, {"a": PARAMS["a"]})
    nodes = jc.compress(PARAMS, jc.plan(PARAMS, [("b", jc.quantize.Int(bits=8)), (".*", None)]))
    with pytest.raises(ValueError, match=r"mu/b: found a Quantized node, expected an array"):
        SMALL.cut({"mu": nodes})
