"""Kernels run as JAX operations, beside the plain product, and lowered for the devices that they are made for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from jcompress.trace.execution.kernels import codes, kept
from jcompress.trace.execution.kernels.platforms import TARGETS, Codes

Int = jc.quantize.Int
HERE = TARGETS["interpret"]
DEVICES = [("tpu", "tpu"), ("gpu", "cuda")]


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def accelerated(node, x, fn=lambda w, x: x @ w):
    fast = jc.accelerate(fn, kernels=jc.trace.Kernels("interpret"))
    return jax.jit(fast)(node, x), fast.report(node, x).rows[0].how


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("shape", "method"),
    [
        ((96, 72), Int(bits=4, group_size=32)),
        ((100, 37), Int(bits=4, group_size=16, symmetric=False, pad=True)),
        ((64, 256), Int(bits=8)),
        ((70, 40), Int(bits=2, group_size=64, symmetric=False, pad=True)),
    ],
)
def test_codes_by_kernels_are_the_dense_product(shape, method, dtype, packed):
    node, x = method(array(*shape)), array(3, shape[0], seed=1).astype(dtype)
    want = x.astype(jnp.float32) @ node.materialize()
    y, how = accelerated(jc.pack(node) if packed else node, x)
    assert how.startswith("kernel: packed codes" if packed and method.bits < 8 else "kernel: codes of 8 bits")
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_along_the_rows_of_a_table(symmetric):
    params, x = {"w": array(75, 96)}, array(2, 96, seed=1)
    rules = [("w", Int(bits=4, group_size=32, symmetric=symmetric))]
    tree = jc.compress(params, jc.plan(params, rules, layout={"w": jc.Layout(inputs=1, outputs=0)}))
    y, how = accelerated(jc.pack(tree), x, lambda p, x: x @ p["w"].T)
    # A transposed value is laid out anew, and read a byte a code; a product over the last axis takes it as it is.
    assert how.startswith("kernel")
    y, how = accelerated(jc.pack(tree), x, lambda p, x: jnp.einsum("bi,oi->bo", x, p["w"]))
    assert how == "kernel: packed codes of 4 bits, groups of 32"
    np.testing.assert_allclose(y, x @ jc.materialize(tree)["w"].T, rtol=1e-5, atol=1e-4)


def test_derivatives_and_batches_are_those_of_the_plain_product():
    node, x = jc.pack(Int(bits=4, group_size=32)(array(96, 72))), array(5, 2, 96, seed=1)
    fast = jc.accelerate(lambda w, x: x @ w, kernels=jc.trace.Kernels("interpret"))
    dense, (train, held) = node.materialize(), jc.split(node)
    np.testing.assert_allclose(jax.vmap(lambda x: fast(node, x))(x), x @ dense, rtol=1e-5, atol=1e-4)

    def slopes(run):
        return jax.grad(lambda t, x: jnp.square(run(jc.merge(t, held), x)).sum(), argnums=(0, 1))(train, x[0])

    for a, b in zip(
        jax.tree.leaves(slopes(fast)), jax.tree.leaves(slopes(lambda n, x: x @ n.materialize())), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_where_nothing_is_measured_the_plain_product_stays():
    kernels, node, x = jc.trace.Kernels(), Int(bits=4, group_size=32)(array(96, 72)), array(2, 96)
    rows = jc.accelerate(lambda w, x: x @ w, kernels=kernels).report(node, x).rows
    assert jax.default_backend() != "cpu" or ("kernel" not in rows[0].how and not kernels.found)
    with pytest.raises(ValueError, match="use 'measured'"):
        jc.trace.Kernels("sometimes")


def test_a_choice_is_measured_once_and_a_refused_kernel_is_never_used():
    kernels, x = jc.trace.Kernels(), array(4, 4)

    def refused(x):
        raise NotImplementedError

    assert not kernels.pays(("a",), refused, lambda x: x + 1, (x,))
    ((key, (by_kernel, by_plain)),) = kernels.found.items()
    assert by_kernel is None and by_plain > 0 and "a" in key
    kernels.found[key] = (by_plain / 2, by_plain)
    assert kernels.pays(("a",), refused, lambda x: x + 1, (x,))
    traced = jax.eval_shape(lambda x: x * kernels.pays(("b",), lambda x: x @ x, lambda x: x @ x @ x, (x,)), x)
    assert traced.shape == (4, 4) and len(kernels.found) == 2


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 2), (4, 8), (1, 4)])
def test_kept_entries_of_groups(keep, of):
    rng, (m, k, n) = np.random.default_rng(0), (3, 80, 72)
    w = np.asarray(jc.prune.Magnitude(pattern=jc.prune.NM(keep, of))(array(k, n)).materialize())
    if keep == 2:  # fewer than may be kept
        w = w * (rng.random(w.shape) < 0.9)
    values, mask = kept.compact(w, keep, of)
    assert values.size * of == keep * k * n and mask.size == k * n // 8
    for dtype in (jnp.float32, jnp.bfloat16):
        x = array(m, k, seed=1).astype(dtype)
        y = kept.by_groups(x, jnp.asarray(values), jnp.asarray(mask), keep, of, HERE)
        near = w if dtype == jnp.float32 else np.asarray(jnp.asarray(w, dtype), np.float32)
        np.testing.assert_allclose(y, np.asarray(x, np.float32) @ near, rtol=1e-5, atol=1e-4)


def test_what_is_no_pattern_is_an_error():
    with pytest.raises(ValueError, match="keeps more than 1 of 4"):
        kept.compact(np.ones((8, 2), np.float32), 1, 4)


def test_kept_blocks():
    rng, size, (rows, columns) = np.random.default_rng(0), 16, (5, 4)
    shown = rng.random((rows, columns)) < 0.4
    shown[:, 1] = False
    blocks = rng.normal(size=(columns, rows, size, size)).astype(np.float32)
    dense = (blocks * shown.T[:, :, None, None]).transpose(1, 2, 0, 3).reshape(rows * size, columns * size)
    inputs = np.concatenate([np.flatnonzero(shown[:, c]) for c in range(columns)])
    x = array(3, rows * size)
    held = jnp.asarray(blocks[shown.T])
    for run in (kept.by_blocks, lambda *a: kept.walked(*a)):
        np.testing.assert_allclose(run(x, held, inputs, shown.sum(0), HERE), x @ dense, rtol=1e-5, atol=1e-4)


def of_codes(run, how, at):
    return lambda x, data, scale=None, zero=None: run(x, data, scale, zero, how, at)


def test_kept_blocks_of_a_tree():
    node = jc.prune.Magnitude(sparsity=0.75, pattern=jc.prune.Block((16, 16)))(array(96, 64))
    for fn, inputs in ((lambda w, x: x @ w, 96), (lambda w, x: jnp.einsum("bo,io->bi", x, w), 64)):
        x = array(3, inputs, seed=1)
        fast = jc.accelerate(fn, kernels=jc.trace.Kernels("interpret"))
        y, products = fast._run(node, (x,))
        assert [row.how for row in products.rows] == ["kernel: 25% of its blocks of 16x16"]
        np.testing.assert_allclose(y, fn(node.materialize(), x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("target", "platform"), DEVICES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_kernels_lower_for_their_devices(target, platform, dtype):
    at, S = TARGETS[target], jax.ShapeDtypeStruct
    k, n = 1024, 512

    def lowers(fn, *shapes):
        text = jax.jit(fn).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
        assert "custom_call" in text

    x = S((1, k), dtype)
    for bits, group, affine in ((4, 32, True), (4, 128, False), (8, None, False)):
        how = Codes(bits, not affine, group, n)
        known = [] if group is None else [S((k // group, n), jnp.float32)] * (1 + affine)
        lowers(of_codes(codes.by_rows, how, at), x, S((k, n * bits // 8), jnp.uint8), *known)
        turned = [S(s.shape[::-1], s.dtype) for s in known]
        lowers(of_codes(codes.by_columns, how, at), x, S((n, k * bits // 8), jnp.uint8), *turned)
    lowers(lambda x, v, b: kept.by_groups(x, v, b, 2, 4, at), x, S((4, k // 8, n), dtype), S((k // 8, n), jnp.uint8))
    for size in (16, 64):
        lowers(
            lambda x, b: kept.by_blocks(x, b, np.array([0, 2, 1]), np.array([2, 0, 1]), at),
            S((1, size * 4), dtype), S((3, size, size), dtype),
        )  # fmt: skip
