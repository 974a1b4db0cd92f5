"""GPTQ against a column by column sweep in float64, brute force, and rounding."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_conformance import collectives

import jcompress as jc
from jcompress import core
from jcompress.quantize import GPTQ, Int


def correlated(rng, k, n=None):
    """Inputs whose features are mixed."""
    mix = rng.normal(size=(k, k)) / k**0.5 + 0.5 * np.eye(k)
    return (rng.normal(size=(n or 4 * k, k)) @ mix).astype(np.float32)


def context(x, path="array", **known):
    gram = jnp.asarray(x.T.astype(np.float64) @ x, jnp.float32)
    return jc.Context(stats=jc.trace.Stats(gram=gram, axes=(-2,)), path=path, **known)


def weights(rng, shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def moved(node, w, x):
    """How far the outputs moved, in squares: tr(dW^T X^T X dW)."""
    return float(((x.astype(np.float64) @ (np.asarray(node.materialize(), np.float64) - np.asarray(w))) ** 2).sum())


def grid_of(w, bits, symmetric):
    """Scale, zero point and largest code of each column, in float64."""
    if symmetric:
        most = 2 ** (bits - 1) - 1
        return np.abs(w).max(0) / most, np.zeros(w.shape[1]), -most, most
    low, high, most = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0), 2**bits - 1
    scale = (high - low) / most
    return scale, np.clip(np.round(-low / scale), 0, most), 0, most


def sweep_by_columns(w, hessian, bits, symmetric, group, order=False):
    """The published algorithm without blocks: each error moves all weights after it at once."""
    w, k = np.asarray(w, np.float64).copy(), len(w)
    dense, turn = w.copy(), np.argsort(-np.diag(hessian)) if order else np.arange(k)
    factor = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(turn, turn)])).T
    w, found = w[turn], np.zeros_like(w)
    for t, j in enumerate(turn):
        if order:
            start = 0 if group is None else j // group * group
            grid = grid_of(dense[start : start + (group or k)], bits, symmetric)
        elif t % (group or k) == 0:
            grid = grid_of(w[t : t + (group or k)], bits, symmetric)
        scale, zero, low, high = grid
        found[j] = scale * (np.clip(np.round(w[t] / scale) + zero, low, high) - zero)
        w[t + 1 :] -= np.outer(factor[t, t + 1 :], (w[t] - found[j]) / factor[t, t])
    return found


@pytest.mark.parametrize(
    ("k", "block", "group", "symmetric", "order"),
    [
        (40, 16, None, True, False),
        (48, 32, 16, False, False),
        (48, 16, 24, True, False),
        (44, 20, 6, True, False),
        (40, 16, 8, False, True),
    ],
)
def test_the_blocked_sweep_is_the_published_one(k, block, group, symmetric, order, rng):
    x, w = correlated(rng, k), weights(rng, (k, 7))
    method = GPTQ(4, group, symmetric, order, block_size=block, damping=0.02, pad=True)
    node = method(w, context(x))
    gram = x.T.astype(np.float64) @ x
    want = sweep_by_columns(w, gram + 0.02 * np.diag(gram).mean() * np.eye(k), 4, symmetric, group, order)
    np.testing.assert_allclose(node.materialize(), want, atol=2e-3)
    plain = Int(4, group, symmetric, pad=True)(w)
    assert jax.tree.structure(node) == jax.tree.structure(plain)
    assert node.nbits() == plain.nbits()


@pytest.mark.parametrize("grid", [Int(3), Int(4, symmetric=False), Int(4, group_size=8), Int(1), Int(4, axis=None)])
def test_with_inputs_that_are_not_correlated_it_is_rounding(grid, rng):
    w = weights(rng, (32, 6))
    stats = jc.trace.Stats(gram=jnp.diag(jnp.asarray(rng.uniform(1, 2, 32), jnp.float32)), axes=(-2,))
    for order in (False, True):
        node = GPTQ(grid=grid, order=order)(w, jc.Context(stats=stats))
        for a, b in zip(jax.tree.leaves(node), jax.tree.leaves(grid(w)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_outputs_move_less_than_by_rounding(rng):
    for method, plain in [
        (GPTQ(3), Int(3)),
        (GPTQ(4, 16, symmetric=False), Int(4, 16, symmetric=False)),
        (GPTQ(3, order=True, clip="mse"), Int(3, clip="mse")),
    ]:
        for _ in range(4):
            mixed = rng.normal(size=(400, 16)) @ rng.normal(size=(16, 64)) / 4 + 0.3 * rng.normal(size=(400, 64))
            x, w = mixed.astype(np.float32), weights(rng, (64, 32))
            assert moved(method(w, context(x)), w, x) < 0.6 * moved(plain(w), w, x)


def test_brute_force_over_all_codes_bounds_it_and_the_last_input_is_optimal(rng):
    x, w = correlated(rng, 5, 60), weights(rng, (5, 24))
    node, plain = GPTQ(3, damping=0.0)(w, context(x)), Int(3)(w)
    every = np.array(list(itertools.product(range(-3, 4), repeat=5)), np.float64)
    hessian, ratios = x.T.astype(np.float64) @ x, []
    for j in range(24):
        scale = float(node.scale[0, j])
        off = scale * every - np.asarray(w)[:, j]
        costs = np.einsum("ci,ij,cj->c", off, hessian, off)
        found, rounded = (costs[(every == np.asarray(n.codes)[:, j]).all(1)][0] for n in (node, plain))
        ratios.append((found / costs.min(), rounded / costs.min()))
        same = (every[:, :4] == np.asarray(node.codes)[:4, j]).all(1)
        np.testing.assert_allclose(found, costs[same].min(), rtol=1e-6)
    means = np.mean(ratios, axis=0)
    assert 1 <= means[0] < means[1]


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_laid_out_as_their_statistics(groups, rng):
    dims = ("NHWC", "HWIO", "NHWC")

    def fn(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "VALID", dimension_numbers=dims, feature_group_count=groups
        )

    params = {"w": weights(rng, (2, 2, 8 // groups, 6))}
    x = jnp.asarray(correlated(rng, 8, 8 * 36).reshape(8, 6, 6, 8))
    x = x + 0.7 * jnp.roll(x, 1, axis=1)
    stats = jc.calibrate(fn, params, [x], statistics=["gram"])
    for group in (None, 4):
        errors = []
        for method in (GPTQ(3, group), Int(3, group)):
            small = jc.compress(params, jc.plan(params, [("w", method)]), stats=stats)
            errors.append(float(((fn(jc.materialize(small), x) - fn(params, x)) ** 2).sum()))
            assert small["w"].scale.shape == ((2, 2, 2 // groups, 6) if group else (1, 1, 1, 6))
        assert errors[0] < 0.8 * errors[1]


def test_kernels_that_contract_their_first_axes_have_one_scale_an_output(rng):
    def fn(params, x):
        return jnp.einsum("bi,ihd->bhd", x, params["w"])

    params, x = {"w": weights(rng, (16, 2, 4))}, jnp.asarray(correlated(rng, 16))
    stats = jc.calibrate(fn, params, [x], statistics=["gram"])
    node = GPTQ(4)(params["w"], jc.Context(stats=stats["w"], path="w"))
    flat = GPTQ(4, grid=None)(params["w"].reshape(16, 8), context(np.asarray(x)))
    assert node.materialize().shape == (16, 2, 4)
    assert moved_by(fn, node, params, x) < moved_by(fn, Int(4)(params["w"]), params, x)
    assert flat.codes.shape == (16, 8)
    with pytest.raises(ValueError, match=r"w: groups of 2 along axis -2 of shape \(16, 2, 4\) do not divide"):
        GPTQ(4, 2)(params["w"], jc.Context(stats=stats["w"], path="w"))


def moved_by(fn, node, params, x):
    return float(((fn({"w": node.materialize()}, x) - fn(params, x)) ** 2).sum())


def test_a_scanned_stack_is_quantized_layer_by_layer(rng):
    def fn(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    params, x = {"w": weights(rng, (3, 8, 8))}, jnp.asarray(correlated(rng, 8))
    stats = jc.calibrate(fn, params, [x], statistics=["gram"])
    each = jc.compress(params, jc.plan(params, [("w", jc.stacked(GPTQ(4, 4)))]), stats=stats)["w"]
    whole = jc.compress(params, jc.plan(params, [("w", GPTQ(4, 4))]), stats=stats)["w"]
    np.testing.assert_array_equal(whole.codes, each.codes)
    assert each.scale.shape == (3, 2, 8)


def test_weights_behind_a_mask_stay_zeros_and_the_others_are_swept(rng):
    x, w = correlated(rng, 32, 300), weights(rng, (32, 16))
    pruned = jc.prune.Magnitude(0.5)(w)
    masked = jc.chain(jc.prune.Magnitude(0.5), GPTQ(4))(w, context(x))
    rounded = jc.chain(jc.prune.Magnitude(0.5), Int(4))(w, context(x))
    assert jax.tree.structure(masked) == jax.tree.structure(rounded)
    np.testing.assert_array_equal(masked.mask, pruned.mask)
    assert moved(masked, pruned.materialize(), x) < 0.8 * moved(rounded, pruned.materialize(), x)


def test_inputs_never_seen_are_rounded(rng):
    x, w = correlated(rng, 16), weights(rng, (16, 4))
    x[:, [3, 7]] = 0
    node = GPTQ(4)(w, context(x))
    np.testing.assert_array_equal(node.codes[jnp.array([3, 7])], Int(4)(w).codes[jnp.array([3, 7])])


def test_sharded_outputs_move_no_weights(rng):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    x, w = correlated(rng, 32), weights(rng, (32, 64))
    known = context(x)
    placed = jax.device_put(w, NamedSharding(mesh, P(None, "model")))
    at_once = jax.jit(lambda w: GPTQ(4, 8, block_size=16)(w, known))
    moved = list(collectives(at_once.lower(placed).compile().as_text()))
    assert all(size == 1 for _, size in moved)  # the largest magnitude, by which values near overflow are divided
    np.testing.assert_array_equal(at_once(placed).codes, GPTQ(4, 8, block_size=16)(w, known).codes)


def test_errors_name_the_parameter(rng):
    params = {"w": jnp.ones((6, 4))}
    with pytest.raises(ValueError, match=r"w: GPTQ needs 'stats.gram', which is missing; pass stats=jc.calibrate"):
        jc.compress(params, jc.plan(params, [("w", GPTQ())]))
    with pytest.raises(ValueError, match="w: found 'gram' of shape"):
        GPTQ()(params["w"], context(correlated(rng, 5), "w"))
    with pytest.raises(ValueError, match="w: group_size 4 does not divide axis -2 of length 6"):
        plan = jc.plan(params, [("w", GPTQ(group_size=4))])  # statistics may lay the leaf out anew
        jc.compress(params, plan, stats={"w": context(correlated(rng, 6), "w").stats})
    with pytest.raises(ValueError, match="give one of them"):
        GPTQ(3, grid=Int(4))
    with pytest.raises(ValueError, match="expected Quantized with an array of scales"):
        GPTQ(grid=jc.quantize.Float())(params["w"], context(correlated(rng, 6), "w"))
    with pytest.raises(ValueError, match="block_size=0 must be positive"):
        GPTQ(block_size=0)


def test_a_compiled_method_is_traced_once_for_a_shape_and_its_errors_name_the_leaf():
    traces = []

    @dataclasses.dataclass(frozen=True)
    class Doubled:
        factor: Any = 2.0

        @core.compiled
        def __call__(self, w, context=core.Context(), /):
            traces.append(context.path)
            if w.ndim == 1:
                raise ValueError(f"{context.path}: found one axis")
            return self.factor * w

    w = jnp.ones((2, 2))
    for path in ("a", "b"):
        np.testing.assert_array_equal(Doubled()(w, core.Context(path=path)), 2 * w)
    assert traces == ["a"]
    np.testing.assert_array_equal(Doubled(3.0)(w, core.Context(path="c")), 3 * w)
    for path in ("d", "e"):
        with pytest.raises(ValueError, match=f"{path}: found one axis"):
            Doubled()(w[0], core.Context(path=path))
    # A hyperparameter without a hash: called as it is, each time, with its own path.
    for path in ("f", "g"):
        np.testing.assert_array_equal(Doubled(jnp.float32(4))(w, core.Context(path=path)), 4 * w)
    assert traces == ["a", "c", "d", "e", "f", "g"]
