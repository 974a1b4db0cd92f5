"""What the axes of a leaf are: read off products in every layout, against a product written by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jcompress as jc

L = jc.Layout
F32 = jnp.float32


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, F32)


def conv(numbers, strides=(1, 1), **options):
    return lambda p, x: lax.conv_general_dilated(x, p["w"], strides, "SAME", dimension_numbers=numbers, **options)


def einsum(spec):
    return lambda p, x: jnp.einsum(spec, x, p["w"])


def scanned(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]


def flipped(p, x):
    return lax.conv_transpose(x, p["w"], (2, 2), "SAME", transpose_kernel=True)


def mamba(p, x):
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x, p["w"][:, None], (1,), "SAME", dimension_numbers=numbers, feature_group_count=6)


def heads_of_outputs(p, x):
    return jnp.einsum("bhk,khd->bhd", x, p["w"].reshape(4, 3, 2))


def layers_one_by_one(p, x):
    for i in range(3):
        x = jnp.tanh(x @ p["w"][i].T)
    return x


def gates(p, x):
    return sum(jnp.split(x @ p["w"].T, 3, -1))


def patches(p, x):
    return x.reshape(2, -1) @ p["w"].reshape(-1, p["w"].shape[-1])


def ensemble(p, x):
    return jax.vmap(lambda w: conv(("NHWC", "HWIO", "NHWC"))({"w": w}, x))(p["w"])


def members(p, x):
    return jax.vmap(lambda w, x: conv(("NHWC", "HWIO", "NHWC"), feature_group_count=2)({"w": w}, x))(p["w"], x)


IMAGE, CHANNELS_FIRST = (2, 6, 6, 4), (2, 4, 6, 6)
CASES = {
    "(in, out)": (lambda p, x: x @ p["w"], (4, 3), (5, 4), L(0, 1)),
    "(out, in)": (lambda p, x: x @ p["w"].T, (3, 4), (5, 4), L(1, 0)),
    "weight on the left": (lambda p, x: p["w"] @ x.T, (3, 4), (5, 4), L(1, 0)),
    "DenseGeneral, heads out": (einsum("btd,dhk->bthk"), (6, 2, 3), (2, 5, 6), L(0, (1, 2))),
    "DenseGeneral, heads in": (einsum("bthk,hkd->btd"), (2, 3, 6), (2, 5, 2, 3), L((0, 1), 2)),
    "(heads, in, dim)": (einsum("btd,hdk->bthk"), (2, 6, 3), (2, 5, 6), L(1, (0, 2))),
    "a head its own inputs": (einsum("bthd,hdk->bthk"), (2, 6, 3), (2, 5, 2, 6), L(1, 2, batch=0)),
    "experts": (einsum("ecd,edf->ecf"), (3, 4, 5), (3, 7, 4), L(1, 2, batch=0)),
    "experts (out, in)": (einsum("ecd,efd->ecf"), (3, 5, 4), (3, 7, 4), L(2, 1, batch=0)),
    "experts in the middle": (einsum("ecd,def->ecf"), (4, 3, 5), (3, 7, 4), L(0, 2, batch=1)),
    "HWIO": (conv(("NHWC", "HWIO", "NHWC")), (3, 3, 4, 8), IMAGE, L(2, 3, window=(0, 1))),
    "OIHW": (conv(("NCHW", "OIHW", "NCHW")), (8, 4, 3, 3), CHANNELS_FIRST, L(1, 0, window=(2, 3))),
    "OHWI": (conv(("NHWC", "OHWI", "NHWC")), (8, 3, 3, 4), IMAGE, L(3, 0, window=(1, 2))),
    "window crossed": (conv(("NHWC", "WHIO", "NHWC")), (5, 3, 4, 8), IMAGE, L(2, 3, window=(0, 1))),
    "grouped": (conv(("NHWC", "HWIO", "NHWC"), feature_group_count=2), (3, 3, 2, 8), IMAGE,
        L(2, 3, window=(0, 1), groups=2)),
    "grouped OIHW": (conv(("NCHW", "OIHW", "NCHW"), feature_group_count=2), (8, 2, 3, 3), CHANNELS_FIRST,
        L(1, 0, window=(2, 3), groups=2)),
    "depthwise": (conv(("NHWC", "HWIO", "NHWC"), feature_group_count=4), (3, 3, 1, 8), IMAGE,
        L(2, 3, window=(0, 1), groups=4)),
    "depthwise, one output each": (conv(("NHWC", "HWIO", "NHWC"), feature_group_count=4), (3, 3, 1, 4), IMAGE,
        L(2, 3, window=(0, 1), groups=4)),
    "depthwise OIHW": (conv(("NCHW", "OIHW", "NCHW"), feature_group_count=4), (4, 1, 3, 3), CHANNELS_FIRST,
        L(1, 0, window=(2, 3), groups=4)),
    "a vector for each head": (einsum("bhd,hd->bh"), (3, 4), (5, 3, 4), L(1, 0, groups=3)),
    "a vector": (lambda p, x: x @ p["w"][:, 0], (4, 1), (5, 4), L(0, 1)),
    "depthwise without an axis of inputs": (mamba, (4, 6), (2, 5, 6), L(0, 1, groups=6)),
    "transposed": (lambda p, x: lax.conv_transpose(x, p["w"], (2, 2), "SAME"), (3, 3, 4, 8), IMAGE,
        L(2, 3, window=(0, 1))),
    "transposed, kernel flipped": (flipped, (3, 3, 8, 4), IMAGE, L(3, 2, window=(0, 1))),
    "scan stack": (scanned, (3, 4, 4), (5, 4), L(1, 2, batch=0)),
    "layers one by one, (out, in)": (layers_one_by_one, (3, 4, 4), (5, 4), L(2, 1, batch=0)),
    "gates": (gates, (9, 4), (5, 4), L(1, 0)),
    "patches as a product": (patches, (6, 6, 4, 3), IMAGE, L((0, 1, 2), 3)),
    "heads split off the outputs": (heads_of_outputs, (4, 6), (5, 3, 4), L(0, 1, groups=3)),
    "kernels of one input": (ensemble, (3, 3, 3, 4, 8), IMAGE, L(3, (0, 4), window=(1, 2))),
    "kernels of inputs of their own": (members, (3, 3, 3, 2, 8), (3, *IMAGE),
        L(3, 4, batch=0, window=(1, 2), groups=2)),
    "1x1 as a product": (lambda p, x: x @ p["w"][0, 0], (1, 1, 4, 8), IMAGE, L(2, 3, batch=(0, 1))),
    "embedding": (lambda p, x: p["w"][x.astype(int)], (9, 4), (5,), L(0, 1)),
    "tied": (lambda p, x: p["w"][x.astype(int)] @ p["w"].T, (9, 4), (5,), L(1, 0)),
    "bfloat16": (lambda p, x: x.astype("bfloat16") @ p["w"].astype("bfloat16").T, (3, 4), (5, 4), L(1, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_axes_are_those_of_the_product(name):
    fn, w, x, want = CASES[name]
    found = jc.trace.layout(fn, {"w": shape(*w)}, shape(*x))
    assert found["w"] == want and not found.unread
    if "embedding" not in name:
        observed = jax.eval_shape(lambda: jc.trace.observe(fn, {"w": jnp.ones(w)}, jnp.ones(x))[1])["w"]
        assert observed.layout == want
        assert observed.axes == want.contracted


@pytest.mark.parametrize("name", ["OIHW", "grouped OIHW", "(heads, in, dim)", "experts in the middle", "scan stack"])
def test_what_methods_see_is_the_weight_of_a_plain_product(name):
    """Zeros along one unit of the outputs, as the layout says them, silence one unit of the product."""
    fn, w, x, want = CASES[name]
    seen = jnp.ones(want.seen(w)).at[..., 0].set(0)
    y = fn({"w": want.restore(seen, w)}, jnp.ones(x))
    share = 1 / seen.shape[-1]
    if name != "scan stack":
        np.testing.assert_allclose((y == 0).mean(), share)


def test_what_cannot_be_said_is_left_out_with_the_reason():
    def fn(p, x):
        heads = jnp.einsum("bhd,hdk->bhk", x.reshape(5, 2, 3), p["split"].reshape(2, 3, 4))
        return heads.sum(1) @ (p["normed"] / jnp.linalg.norm(p["normed"])) + p["bias"]

    p = {"split": shape(6, 4), "normed": shape(4, 3), "bias": shape(3), "spare": shape(2)}
    found = jc.trace.layout(fn, p, shape(5, 6))
    assert not len(found)
    assert found.unread["split"] == "parts of its axis -2 play different roles in the product"
    assert "before it meets an activation" in found.unread["normed"]
    assert found.unread["bias"] == found.unread["spare"] == "in no product with an activation"
    with pytest.raises(KeyError, match="spare: no layout: in no product"):
        found["spare"]
    assert found.get("spare") is None


def test_calibrate_keeps_the_layout_over_batches():
    stats = jc.calibrate(lambda p, x: x @ p["w"].T, {"w": jnp.ones((3, 4))}, [jnp.ones((2, 4))] * 2)
    assert stats["w"].layout == L(1, 0)
    assert math.prod(stats["w"].gram.shape) == 16


def gram_of(fn, w, *args):
    """The Gram matrix of a linear function's leaf for one output, from its derivative: all outputs see the same."""
    jacobian = jax.jacobian(fn)(w, *args)
    taps = np.asarray(jacobian, np.float64).reshape(-1, math.prod(w.shape))
    return taps.T @ taps


MOVED = {
    "flipped kernel": (lambda w, x: lax.conv_transpose(x, w, (2,), "SAME", transpose_kernel=True),
        (3, 1, 2), (2, 5, 2)),
    "flipped by hand": (lambda w, x: x @ w[::-1], (4, 1), (5, 4)),
    "flipped in part": (lambda w, x: x @ w.reshape(2, 3, 1)[:, ::-1].reshape(6, 1), (6, 1), (5, 6)),
    "every second row, back": (lambda w, x: x @ w[::-2][::-1], (4, 1), (5, 2)),
    "tiled along the inputs": (lambda w, x: x @ jnp.tile(w, (2, 1)), (4, 1), (5, 8)),
    "repeated along the inputs": (lambda w, x: x @ jnp.repeat(w, 2, 0), (4, 1), (5, 8)),
    "spread over a window": (
        lambda w, x: lax.conv_general_dilated(x, jnp.broadcast_to(w, (3, 4, 1)), (1,), "SAME",
            dimension_numbers=("NWC", "WIO", "NWC")), (4, 1), (2, 5, 4)),
    "layers flipped": (lambda w, x: lax.scan(lambda h, w: (h, x @ w), 0.0, w[::-1])[1], (3, 4, 1), (5, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
def test_a_change_of_layout_is_followed(name):
    """The Gram matrix of a leaf of one output is J^T J, whatever the function does to the leaf."""
    fn, shape, other = MOVED[name]
    w, x = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate((shape, other)))
    stats = jc.trace.observe(lambda p, x: fn(p["w"], x), {"w": w}, x)[1]
    if name == "every second row, back":
        assert stats.unread["w"] == "a part of its axis -2 is contracted"
        return
    want = gram_of(fn, w, x)
    if w.ndim > 2 and "layers" in name:
        want = np.stack([want[i : i + 4, i : i + 4] for i in (0, 4, 8)])
    if name == "flipped kernel":
        want = want[:6, :6]
    np.testing.assert_allclose(stats["w"].gram, want, rtol=1e-5, atol=1e-4)


def test_what_is_repeated_along_the_outputs_counts_once():
    w, x = jax.random.normal(jax.random.key(0), (4, 3)), jax.random.normal(jax.random.key(1), (5, 4))
    plain = jc.trace.observe(lambda p, x: x @ p["w"], {"w": w}, x)[1]["w"]
    tiled = jc.trace.observe(lambda p, x: x @ jnp.tile(p["w"], (1, 2)), {"w": w}, x)[1]["w"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), plain, tiled)
    assert plain.layout == tiled.layout


@pytest.mark.parametrize("moved", [lambda w: w[::-1], lambda w: jnp.tile(w, (2, 1)), lambda w: w.T[:, ::-1].T])
@pytest.mark.parametrize("method", [jc.quantize.Int(bits=8), jc.factorize.SVD(rank=1)])
def test_execution_follows_them_too(moved, method):
    params, x = {"w": jax.random.normal(jax.random.key(0), (4, 6))}, jnp.ones((3, 4))

    def fn(p, x):
        return jnp.tile(x, (1, moved(p["w"]).shape[0] // 4)) @ moved(p["w"])

    tree = jc.compress(params, jc.plan(params, [("w", method)]))
    np.testing.assert_allclose(jc.accelerate(fn)(tree, x), fn(jc.materialize(tree), x), rtol=1e-5, atol=1e-5)
