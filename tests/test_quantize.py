"""Grids, rounding and clipping, against formulas and brute force."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc

Int = jc.quantize.Int


def weights(shape=(32, 12), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("bits", [*range(2, 10), 12, 16])
def test_symmetric_rounding_is_the_nearest_of_its_grid(bits):
    w = weights()
    node = Int(bits=bits)(w)
    most = 2 ** (bits - 1) - 1
    scale = np.abs(np.asarray(w)).max(0, keepdims=True) / most
    np.testing.assert_allclose(node.scale, scale, rtol=1e-6)
    assert int(jnp.abs(node.codes).max()) == most
    assert float((jnp.abs(node.materialize() - w) - node.scale / 2).max()) < 1e-6
    assert node.codes.dtype == (jnp.int8 if bits <= 8 else jnp.int16)
    np.testing.assert_array_equal(node.codes, Int(bits=bits)(node.materialize()).codes)
    np.testing.assert_array_equal(Int(bits=bits)(-w).codes, -node.codes)


@pytest.mark.parametrize("bits", [*range(1, 10), 12, 16])
def test_affine_grids_hold_zero_exactly(bits):
    w = weights() + 1.5
    w = w.at[3, 2].set(0.0)
    node = Int(bits=bits, symmetric=False)(w)
    assert float(node.materialize()[3, 2]) == 0.0
    assert int(node.codes.max()) <= 2**bits - 1
    assert node.codes.dtype == (jnp.uint8 if bits <= 8 else jnp.uint16)
    error = jnp.abs(node.materialize() - w)
    assert float((error - node.scale).max()) < 1e-6  # half a step for rounding, half for the zero point
    np.testing.assert_allclose(
        Int(bits=bits, symmetric=False)(node.materialize()).materialize(), node.materialize(), atol=1e-5
    )


def test_rounding_is_monotone():
    w = jnp.sort(weights((200, 1)), axis=0)
    for symmetric in (True, False):
        assert bool((jnp.diff(Int(bits=3, symmetric=symmetric, axis=None)(w).materialize()[:, 0]) >= 0).all())


def test_one_symmetric_bit_is_the_sign_with_the_mean_magnitude():
    w = weights()
    node = Int(bits=1)(w)
    np.testing.assert_allclose(node.materialize(), np.sign(w) * np.abs(w).mean(0), rtol=1e-5)
    grid = np.linspace(0.3, 1.3, 201)
    errors = [np.square(np.asarray(w)[:, 0] - a * np.sign(w)[:, 0]).sum() for a in grid]
    assert abs(grid[np.argmin(errors)] - float(node.scale[0, 0])) < 0.006
    assert int(node.nbits()) == w.size + 32 * 12


@pytest.mark.parametrize("group_size", [4, 8, 32])
def test_groups_run_along_the_contraction_axis(group_size):
    w = weights()
    node = Int(bits=4, group_size=group_size)(w)
    assert node.scale.shape == (32 // group_size, 12)
    alone = [Int(bits=4)(w[i : i + group_size]).materialize() for i in range(0, 32, group_size)]
    np.testing.assert_allclose(node.materialize(), np.concatenate(alone), atol=1e-6)
    assert node.nbits() == 4 * 384 + 32 * 12 * 32 // group_size


def test_a_padded_last_group_is_like_a_smaller_one():
    w = weights((10, 3))
    node = Int(bits=4, group_size=4, pad=True)(w)
    assert node.scale.shape == (3, 3)
    np.testing.assert_allclose(node.materialize()[8:], Int(bits=4)(w[8:]).materialize(), atol=1e-6)
    projected = node.project(2 * w)
    np.testing.assert_allclose(projected.scale[2], 2 * Int(bits=4)(w[8:]).project(w[8:]).scale[0], rtol=1e-5)


def test_finer_scales_never_lose():
    w = weights() * jnp.exp(weights((1, 12), 1))
    errors = [
        float(((Int(bits=4, **kw)(w).materialize() - w) ** 2).sum())
        for kw in ({"axis": None}, {}, {"group_size": 8}, {"group_size": 4})
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_clipping_reaches_the_brute_force_optimum(bits, symmetric):
    w = weights((64, 3), seed=3)
    w = w.at[0].mul(4.0)
    node = Int(bits=bits, clip="mse", symmetric=symmetric)(w)
    for column in range(3):
        x = np.asarray(w)[:, column]
        best = np.inf
        for part in np.linspace(0.05, 1.0, 2000):
            if symmetric:
                scale = part * np.abs(x).max() / (2 ** (bits - 1) - 1)
                q = scale * np.clip(np.round(x / scale), -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)
            else:
                low, high = part * min(x.min(), 0), part * max(x.max(), 0)
                scale = (high - low) / (2**bits - 1)
                zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
                q = scale * (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero)
            best = min(best, np.square(q - x).sum())
        found = np.square(np.asarray(node.materialize())[:, column] - x).sum()
        assert found <= 1.02 * best
    plain = Int(bits=bits, symmetric=symmetric)(w).materialize()
    assert float(((node.materialize() - w) ** 2).sum()) < float(((plain - w) ** 2).sum())


def test_hidden_entries_do_not_move_the_range():
    w = weights((16, 4))
    mask = jnp.abs(w) < 1.0
    node = Int(bits=4)(w, jc.Context(where=mask))
    np.testing.assert_allclose(node.scale, jnp.max(jnp.abs(jnp.where(mask, w, 0)), 0, keepdims=True) / 7, rtol=1e-6)


def test_least_squares_scales():
    w, node = weights(seed=1), Int(bits=4)(weights())
    codes = np.asarray(node.codes, np.float64)
    want = (codes * np.asarray(w, np.float64)).sum(0) / (codes**2).sum(0)
    np.testing.assert_allclose(node.project(w).scale[0], want, rtol=1e-5)


@pytest.mark.parametrize("bits", [0, 17, 2.5, -1, "4", True])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=r"bits=.* is not an integer from 1 to 16"):
        Int(bits=bits)


def test_a_group_size_that_does_not_divide_names_the_parameter_and_a_fix():
    params = {"encoder": {"kernel": jnp.ones((300, 4))}}
    message = r"encoder/kernel: group_size 128 does not divide axis -2 of length 300, the inputs; use 100, or pad=True"
    with pytest.raises(ValueError, match=message):
        jc.plan(params, [(".*", Int(bits=4, group_size=128))])
    with pytest.raises(ValueError, match=r"bias: group_size 4 needs axis -2, found shape \(8,\)"):
        jc.plan({"bias": jnp.ones(8)}, [("bias", Int(bits=4, group_size=4))])
    with pytest.raises(ValueError, match=r"w: axis -3 is out of range for shape \(4, 4\)"):
        jc.plan({"w": jnp.ones((4, 4))}, [("w", Int(axis=-3))])
    with pytest.raises(ValueError, match="clip='kl' is unknown"):
        Int(clip="kl")
    with pytest.raises(ValueError, match="group_size=0 must be positive"):
        Int(group_size=0)


def test_simulated_gradients_are_the_identity_and_values_exact():
    params = {"w": weights()}
    plan = jc.plan(params, [("w", Int(bits=3))])
    exact = jc.materialize(jc.compress(params, plan))["w"]
    np.testing.assert_array_equal(jc.simulate(params, plan)["w"], exact)
    gradient = jax.grad(lambda p: (jc.simulate(p, plan)["w"] ** 2).sum())(params)["w"]
    np.testing.assert_allclose(gradient, 2 * exact, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float_storage(dtype):
    w = weights()
    node = jc.quantize.Float(dtype)(w)
    np.testing.assert_array_equal(node.materialize(), w.astype(dtype).astype(jnp.float32))
    assert node.nbits() == 16 * w.size
    with pytest.raises(ValueError, match="is not a float dtype"):
        jc.quantize.Float("int8")


def test_eight_bit_floats_do_not_overflow_to_nan():
    node = jc.quantize.Float("float8_e4m3fn")(jnp.array([1e4, -1e4, 1.0]))
    assert node.materialize().tolist() == [448.0, -448.0, 1.0]
    train, held = jc.split(node)
    assert train.values is None
    assert held.values is not None


@pytest.mark.parametrize("shape", [(256, 256), (200, 300), (5, 3), (2, 130, 129)])
def test_each_block_has_the_scale_of_its_largest_entry(shape):
    w = weights(shape)
    node = jc.quantize.Float8("e4m3", block=(128, 128))(w)
    *lead, rows, columns = shape
    scales = np.zeros((*lead, -(-rows // 128), -(-columns // 128)))
    wanted = np.zeros(shape, np.float32)
    for index in np.ndindex(*scales.shape):
        *front, i, j = index
        at = (*front, slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        scales[index] = np.abs(w[at]).max() / 448
        wanted[at] = (w[at] / node.scale[index]).astype(jnp.float8_e4m3fn).astype(np.float32) * node.scale[index]
    np.testing.assert_allclose(node.scale, scales, rtol=1e-6)
    np.testing.assert_array_equal(node.materialize(), wanted)
    assert node.nbits() == 8 * w.size + 32 * scales.size
    # The projection is least squares, block by block.
    grown = jax.tree.map(lambda x: x * 3 if x.dtype == jnp.float32 else x, node).project(w)
    error = jax.grad(lambda s: ((dataclasses.replace(node, scale=s).materialize() - w) ** 2).sum())(grown.scale)
    assert float(jnp.abs(error).max()) < 1e-2 * float(jnp.square(w).sum())


def test_blocks_serve_all_that_rounds_on_a_grid(rng):
    w, x = weights((24, 20)), jnp.asarray(rng.normal(size=(64, 24)) @ rng.normal(size=(24, 24)), jnp.float32)
    grid = Int(bits=3, block=(10, 8))
    params, gram = {"w": w}, x.T @ x
    stats = jc.calibrate(lambda p, x: x @ p["w"], params, [x])

    def error(method):
        node = jc.compress(params, jc.plan(params, [("w", method)]), stats=stats, key=jax.random.key(0))["w"]
        inner = getattr(node, "values", node)
        assert inner.scale.shape == (3, 3)
        change = node.materialize() - w
        return float(jnp.trace(change.T @ gram @ change))

    assert error(jc.quantize.GPTQ(grid=grid)) < 0.7 * error(grid)
    assert error(jc.quantize.Int(bits=3, block=(10, 8), clip="mse", symmetric=False)) < error(grid)
    error(jc.chain(jc.prune.Magnitude(sparsity=0.5), grid))
    error(jc.quantize.Stochastic(grid))
    error(jc.prune.SparseGPT(sparsity=0.5, quantizer=grid))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: Int(block=(128,)), r"Int: block=\(128,\) must be a pair of positive numbers"),
        (lambda: Int(block=128), "Int: block=128 must be a pair"),
        (lambda: jc.quantize.Float8(block=(0, 8)), r"Float8: block=\(0, 8\) must be a pair"),
        (lambda: Int(group_size=8, block=(8, 8)), "Int: found group_size and block"),
        (lambda: jc.plan({"b": jnp.ones(8)}, [("b", Int(block=(8, 8)))]), r"b: block \(8, 8\) needs two axes"),
    ],
)
def test_what_is_no_block(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()


@pytest.mark.parametrize("symmetric", [True, False])
def test_wide_codes_are_executed_as_exactly_as_their_dense_weight(symmetric):
    w, x = weights((40, 12)), weights((8, 40), seed=1)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    for dtype, told in ((jnp.float32, "int16 levels"), (jnp.bfloat16, "bfloat16 holds no codes of 12 bits")):
        params, x = {"w": w.astype(dtype)}, x.astype(dtype)
        tree = jc.compress(params, jc.plan(params, [("w", Int(bits=12, symmetric=symmetric))]))
        fast, want = jc.accelerate(fn), fn(jc.materialize(tree), x)
        assert told in str(fast.report(tree, x))
        np.testing.assert_allclose(fast(tree, x).astype(jnp.float32), want.astype(jnp.float32), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("bits", "weight_bits", "limit"), [(16, 8, 0.01), (16, 16, 1e-4), (10, 12, 0.004)])
def test_activations_of_more_than_eight_bits(bits, weight_bits, limit):
    params, x = {"w": weights((40, 12))}, weights((8, 40), seed=1)
    for mode in ("integer", "simulate"):
        fn = jc.quantize.activations(lambda p, x: x @ p["w"], params, x, bits=bits, weight_bits=weight_bits, mode=mode)
        np.testing.assert_allclose(fn(params, x), x @ params["w"], atol=limit * float(jnp.abs(x @ params["w"]).max()))
    with pytest.raises(ValueError, match="not an integer from 2 to 16"):
        jc.quantize.activations(lambda p, x: x @ p["w"], params, x, bits=17)
