"""Few rows against codes: sums of integers as exact as those of floats, lookups of single rows, packed trees alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc

Int = jc.quantize.Int
METHODS = {
    "4 bits": Int(bits=4, group_size=32),
    "4 bits, affine": Int(bits=4, group_size=32, symmetric=False),
    "3 bits, groups of 48": Int(bits=3, group_size=48),
    "8 bits": Int(bits=8),
    "8 bits, affine, groups of 64": Int(bits=8, group_size=64, symmetric=False),
    "5 bits, affine": Int(bits=5, symmetric=False),
    "masked, affine": jc.chain(
        jc.prune.Magnitude(sparsity=0.5), Int(bits=4, group_size=32, symmetric=False)
    ),
}  # fmt: skip


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def beside(fn, tree, *args, tolerance=1e-5):
    """How the products were made, after a comparison in float64, of the tree and of the packed one."""
    fast = jc.accelerate(fn)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), jc.materialize(tree))
    want = fn(wide, *(np.asarray(x, np.float64) if x.dtype == np.float32 else np.asarray(x) for x in args))
    for given in (tree, jc.pack(tree)):
        got = jax.jit(fast)(given, *args)
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * float(np.abs(want).max()))
    rows = fast.report(jc.pack(tree), *args).rows
    assert [r.how for r in fast.report(tree, *args).rows] == [r.how for r in rows]
    return [row.how for row in rows]


@pytest.mark.parametrize("name", METHODS)
def test_few_rows_are_summed_as_integers(name):
    node, x = METHODS[name](array(192, 112)), array(2, 192, seed=1)
    (how,) = beside(lambda w, x: x @ w, node, x)
    assert "integers" in how
    if "masked" not in name:  # a mask stands where its node was fitted
        (how,) = beside(lambda w, x: (w.T @ x.T).T, node, x)
        assert "integers" in how or "48" in name


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_table_is_read_by_rows_and_multiplied_along_them(symmetric):
    params = {"w": array(300, 96)}
    rules = [("w", Int(bits=4, group_size=32, symmetric=symmetric))]
    tree = jc.compress(params, jc.plan(params, rules, layout={"w": jc.Layout(inputs=1, outputs=0)}))
    tokens = jnp.array([3, 299, 0])

    def fn(p, tokens):
        return p["w"][tokens] @ p["w"].T

    (how,) = beside(fn, tree, tokens)
    assert "integers" in how
    whole = jax.jit(jc.accelerate(fn)).lower(jc.pack(tree), tokens[:1]).compile().memory_analysis()
    assert whole.temp_size_in_bytes < 300 * 96 * 4 / 2


@pytest.mark.parametrize("group_size", [None, 10, (10, 8)])
def test_rows_of_any_table_are_those_of_the_dense_one(group_size):
    method = Int(bits=4, symmetric=False, block=group_size) if isinstance(group_size, tuple) else Int(
        bits=4, symmetric=False, group_size=group_size
    )  # fmt: skip
    tree, tokens = {"w": method(array(40, 16))}, jnp.array([[0, 39, -1], [40, 7, -40]])
    for given in (tree, jc.pack(tree)):
        for mode in (None, "clip", "fill"):

            def fn(p, tokens, mode=mode):
                return p["w"].at[tokens].get(mode=mode)

            np.testing.assert_array_equal(
                jax.jit(jc.accelerate(fn))(given, tokens), jax.jit(fn)(jc.materialize(tree), tokens)
            )


def test_what_is_not_finite_stays_so():
    node = METHODS["4 bits"](array(192, 112))
    fast = jax.jit(jc.accelerate(lambda w, x: x @ w))
    x = array(4, 192, seed=1).at[1, 3].set(jnp.nan).at[2, 5].set(jnp.inf).at[3].set(0)
    y = fast(node, x)
    assert jnp.isfinite(y[0]).all() and jnp.isnan(y[1]).all() and not jnp.isfinite(y[2]).any() and (y[3] == 0).all()


def test_small_and_large_activations_keep_their_digits():
    node, x = METHODS["4 bits"](array(192, 112)), array(1, 192, seed=1)
    fast = jax.jit(jc.accelerate(lambda w, x: x @ w))
    want = np.asarray(x, np.float64) @ np.asarray(node.materialize(), np.float64)
    for factor in (1e-30, 1.0, 1e30):
        np.testing.assert_allclose(fast(node, x * factor) / factor, want, rtol=1e-4, atol=1e-5)


def test_the_largest_codes_do_not_overflow():
    for bits, dtype, zero in ((8, jnp.int8, None), (8, jnp.uint8, jnp.full((8, 64), 255, jnp.uint8))):
        low, high = (-128, 127) if zero is None else (0, 255)
        for code in (low, high):
            codes = jnp.full((512, 64), code, dtype)
            zeros = None if zero is None else (zero if code == low else jnp.zeros_like(zero))
            node = jc.formats.Quantized(codes, jnp.ones((8, 64)), zeros, bits=bits, group_size=64)
            x = jnp.ones((1, 512)).at[0, ::2].set(0.999)
            got = jc.accelerate(lambda w, x: x @ w)(node, x)
            np.testing.assert_allclose(got, x @ node.materialize(), rtol=1e-5)


def test_derivatives_in_both_directions_and_batches():
    node, x = METHODS["4 bits"](array(192, 112)), array(1, 192, seed=1)
    fast, dense = jc.accelerate(lambda w, x: jnp.tanh(x @ w)), node.materialize()
    plain = lambda x: jnp.tanh(x @ dense)  # noqa: E731
    for kind in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(kind(lambda x: fast(node, x))(x), kind(plain)(x), rtol=1e-4, atol=1e-5)
    many = array(5, 1, 192, seed=2)
    np.testing.assert_allclose(jax.vmap(lambda x: fast(node, x))(many), plain(many), rtol=1e-5, atol=1e-5)


def test_packed_layers_are_sliced_as_they_are_packed():
    node, x = jc.stacked(METHODS["4 bits, affine"])(array(4, 128, 128) / 12), array(1, 128, seed=1)

    def fn(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    (how,) = beside(fn, node, x)
    assert "integers" in how
    packed = jc.pack(node)
    memory = jax.jit(jc.accelerate(fn)).lower(packed, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 128 * 128  # less than a byte for each code of all layers


def test_other_devices_get_the_plain_product():
    node, x = METHODS["4 bits"](array(192, 112)), array(1, 192, seed=1)
    step = jax.jit(jc.accelerate(lambda w, x: x @ w))
    exported = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(node, x)
    np.testing.assert_allclose(exported.call(node, x), x @ node.materialize(), rtol=1e-5, atol=1e-5)
    assert "dynamic_slice" not in step.lower(node, x).as_text()
