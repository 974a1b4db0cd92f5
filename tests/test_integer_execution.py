"""Functions run on compressed parameters, and with integers for activations: against the dense function, against
products of integers made by NumPy, and the two modes of quantization against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc

Int = jc.quantize.Int


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * float(np.max(np.abs(y)) + 1e-30))


def grid(x, axis, bits=8):
    """Codes and scales by the formula."""
    m = 2 ** (bits - 1) - 1
    scale = np.abs(x).max(axis, keepdims=True).astype(np.float32) * np.float32(1 / m)
    return np.clip(np.round(x * (np.float32(1) / scale)), -m, m).astype(np.int64), scale


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scale", ["tensor", "row"])
@pytest.mark.parametrize("mode", ["integer", "simulate"])
def test_a_product_is_that_of_numpys_integers(mode, scale, bits, rng):
    x, w = (rng.normal(size=s).astype(np.float32) for s in ((5, 16), (16, 3)))
    (q, s), (c, t) = grid(x, None if scale == "tensor" else 1, bits), grid(w, 0)
    found = jc.quantize.activations(lambda p, x: x @ p, w, scale=scale, mode=mode, bits=bits)(w, x)
    np.testing.assert_array_max_ulp(np.asarray(found), ((q @ c).astype(np.float32) * (s * t)).astype(np.float32), 1)


@pytest.mark.parametrize("mode", ["integer", "simulate"])
def test_affine_codes_are_exact_at_zero_and_gain_on_one_side(mode, rng):
    x, w = np.abs(rng.normal(size=(64, 16))).astype(np.float32), rng.normal(size=(16, 3)).astype(np.float32)
    x[:, ::2] = 0
    error = {}
    for symmetric in (True, False):
        fn = jc.quantize.activations(lambda p, x: x @ p, w, symmetric=symmetric, mode=mode, bits=4)
        error[symmetric] = np.linalg.norm(fn(w, x) - x @ w)
        assert np.all(np.asarray(fn(w, np.zeros_like(x))) == 0)
    assert error[False] < 0.7 * error[True]  # twice the levels over the range that is used


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_the_product_of_its_patches(groups, symmetric, rng):
    x = (rng.normal(size=(2, 6, 5, 4)) + 0.5).astype(np.float32)
    w = rng.normal(size=(3, 3, 4 // groups, 6)).astype(np.float32)

    def fn(w, x):
        return jax.lax.conv_general_dilated(
            x, w, (2, 1), ((1, 2), (1, 0)), lhs_dilation=(2, 1), dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip

    found = [jc.quantize.activations(fn, w, symmetric=symmetric, mode=m)(w, x) for m in ("integer", "simulate")]
    np.testing.assert_array_max_ulp(*map(np.asarray, found), 1)
    # Quantized by hand, and multiplied as floats.
    if symmetric:
        (q, s), (c, t) = grid(x, None), grid(w, (0, 1, 2))
        close(found[0], fn((c * t).astype(np.float32), (q * s).astype(np.float32)))


def test_static_ranges_come_from_calibration_layer_by_layer(rng):
    params = jnp.asarray(rng.normal(size=(3, 8, 8)) / 3, jnp.float32)
    x = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) * 3, None), x, params)[0]

    def unrolled(params, x):
        for w in params:
            x = jnp.tanh(x @ w) * 3
        return x

    tree = jc.compress(params, jc.plan(params, [(".*", jc.stacked(Int(bits=8)))]))
    stats = jc.calibrate(fn, params, [x], statistics=("absmax",))
    static = jc.quantize.activations(fn, tree, x, stats=stats)
    largest = next(iter(stats.values())).absmax.max(-1)
    alone = {f"{i}": float(a) for i, a in enumerate(largest)}
    layers = {str(i): tree_slice(tree, i) for i in range(3)}
    by_hand = jc.quantize.activations(lambda p, x: unrolled(p.values(), x), layers, stats=alone)
    close(jax.jit(static)(tree, x), jax.jit(by_hand)(layers, x), 1e-6)
    assert "static" in static.report().rows[0].how
    # On the batch that was calibrated on, the first layer's static range is that of the batch.
    first = jc.quantize.activations(lambda p, x: x @ p, tree_slice(tree, 0))
    once = jc.quantize.activations(lambda p, x: x @ p, tree_slice(tree, 0), stats={"": alone["0"]})
    np.testing.assert_array_equal(first(tree_slice(tree, 0), x), once(tree_slice(tree, 0), x))


def tree_slice(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def test_weights_on_the_fly_are_those_of_int(rng):
    w, x = jnp.asarray(rng.normal(size=(12, 7)), jnp.float32), jnp.asarray(rng.normal(size=(4, 12)), jnp.float32)
    fn = jc.quantize.activations(lambda p, x: x @ p["w"], {"w": w})
    np.testing.assert_array_equal(fn({"w": w}, x), fn({"w": Int(bits=8)(w)}, x))


def test_gradients_pass_straight_through(rng):
    w, x = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
    g = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    fn = jc.quantize.activations(lambda p, x: x @ p, w, mode="simulate")
    dw, dx = jax.grad(lambda w, x: (fn(w, x) * g).sum(), (0, 1))(w, x)
    (q, s), (c, t) = grid(np.asarray(x), None), grid(np.asarray(w), 0)
    close(dw, (q * s).T @ np.asarray(g))  # what the product saw, in place of x and w
    close(dx, np.asarray(g) @ (c * t).T)
    clipped = jc.quantize.activations(lambda p, x: x @ p, w, mode="simulate", stats={"": 0.5})
    dx = jax.grad(lambda x: (clipped(w, x) * g).sum())(x)
    inside = np.abs(np.round(np.asarray(x) * 254)) <= 127
    assert not inside.all()
    np.testing.assert_array_equal(np.asarray(dx)[~inside], 0)
    close(np.asarray(dx)[inside], (np.asarray(g) @ (c * t).T)[inside])


def test_the_scales_of_nodes_are_trained(rng):
    node = Int(bits=4)(jnp.asarray(rng.normal(size=(6, 4)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
    fn = jc.quantize.activations(lambda p, x: x @ p, node, mode="simulate")
    train, held = jc.split(node)
    found = jax.grad(lambda t: fn(jc.merge(t, held), x).sum())(train).scale
    q, s = grid(np.asarray(x), None)
    close(found, ((q * s) @ np.asarray(node.codes)).sum(0, keepdims=True))


def test_bfloat16(rng):
    w, x = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((64, 8), (4, 64)))
    node = Int(bits=8)(w)
    integer, simulated = (
        jc.quantize.activations(lambda p, x: x @ p, node, mode=m)(node, x) for m in ("integer", "simulate")
    )
    assert integer.dtype == jnp.bfloat16
    np.testing.assert_array_equal(integer, simulated)
    close(integer.astype(jnp.float32), (x @ w).astype(jnp.float32), 0.05)
    fast = jc.accelerate(lambda p, x: x @ p)(node, x)
    assert fast.dtype == jnp.bfloat16
    close(fast.astype(jnp.float32), (x @ node.materialize()).astype(jnp.float32), 0.02)


VIEWS = {
    "transposed": (lambda w, x: x @ w.T, (5, 12)),
    "heads": (lambda w, x: jnp.einsum("bi,ihd->bhd", x, w.reshape(12, 2, 3)), (12, 6)),
    "slices": (lambda w, x: (x @ w[:, :2]) * (x @ w[:, 2:4]), (12, 4)),
    "on the left": (lambda w, x: jnp.einsum("io,bi->ob", w, x), (12, 5)),
    "experts": (lambda w, x: jnp.einsum("bei,eio->beo", jnp.stack([x, 2 * x], 1), w), (2, 12, 3)),
    "cast": (lambda w, x: x @ w.astype(jnp.float16).astype(jnp.float32), (12, 5)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_followed(view, rng):
    fn, shape = VIEWS[view]
    w, x = jnp.asarray(rng.normal(size=shape), jnp.float32), jnp.asarray(rng.normal(size=(3, 12)), jnp.float32)
    method = jc.stacked(Int(bits=8)) if len(shape) > 2 else Int(bits=8, axis=0 if view == "transposed" else -1)
    node = method(w)
    tolerance = 2e-3 if view == "cast" else 1e-5  # the codes are not cast
    close(jc.accelerate(fn)(node, x), fn(node.materialize(), x), tolerance)
    found = [jc.quantize.activations(fn, node, x, mode=m) for m in ("integer", "simulate")]
    assert all("int32" in row.how for row in found[0].report().rows), str(found[0].report())
    close(found[0](node, x), found[1](node, x), 1e-6)
    close(found[0](node, x), fn(w, x), 0.05)


FACTORS = [
    jc.factorize.SVD(rank=2),
    jc.chain(jc.factorize.SVD(rank=2), Int(bits=8)),
    jc.residual(Int(bits=4), jc.factorize.SVD(rank=2)),
]


@pytest.mark.parametrize("method", FACTORS)
def test_factors_are_multiplied_one_after_the_other(method, rng):
    w, x = jnp.asarray(rng.normal(size=(12, 10)), jnp.float32), jnp.asarray(rng.normal(size=(3, 12)), jnp.float32)
    node = method(w)
    fast = jc.accelerate(lambda w, x: x @ w)
    close(fast(node, x), x @ node.materialize())
    assert [row.shape for row in fast.report(node, x).rows][-2:] == [(12, 2), (2, 10)]


HEADS = {
    "inputs, heads, size": ("btd,dhk->bthk", (32, 4, 8), (2, 5, 32)),
    "heads, inputs, size": ("btd,hdk->bthk", (4, 32, 8), (2, 5, 32)),
    "heads, size, outputs": ("bthk,hkd->btd", (4, 8, 32), (2, 5, 4, 8)),
    "first": ("dhk,btd->hkbt", (32, 4, 8), (2, 5, 32)),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    "method",
    [
        jc.factorize.SVD(rank=3),
        jc.chain(jc.factorize.SVD(rank=3), jc.quantize.Int(8)),
        jc.residual(jc.quantize.Int(4), jc.factorize.SVD(rank=2)),
    ],
    ids=repr,
)
def test_factors_of_kernels_that_are_split_into_heads(name, method, rng):
    equation, shape, of = HEADS[name]
    order = equation.partition("->")[0].split(",")
    params, x = {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}, jnp.asarray(rng.normal(size=of), jnp.float32)

    def fn(params, x):
        pair = (x, params["w"]) if order[0].startswith("b") else (params["w"], x)
        return jnp.einsum(equation, *pair)

    plan = jc.plan(params, [("w", method)], layout=jc.trace.layout(fn, params, x))
    tree, fast = jc.compress(params, plan), jc.accelerate(fn)
    np.testing.assert_allclose(fast(tree, x), fn(jc.materialize(tree), x), rtol=2e-4, atol=2e-4)
    told = str(fast.report(tree, x))
    assert "made dense" not in told and ("factors" in told or told.count("dot_general") > 1)
    grads = jax.grad(lambda t: jnp.square(fast(jc.merge(t, jc.split(tree)[1]), x)).sum())(jc.split(tree)[0])
    wanted = jax.grad(lambda t: jnp.square(fn(jc.materialize(jc.merge(t, jc.split(tree)[1])), x)).sum())(
        jc.split(tree)[0]
    )
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2)


def test_tied_factors_and_convolutions_of_factors(rng):
    w, x = jnp.asarray(rng.normal(size=(12, 10)), jnp.float32), jnp.asarray(rng.normal(size=(3, 12)), jnp.float32)

    def tied(w, x):
        return jnp.einsum("bi,oi->ob", jnp.tanh(x @ w), w)

    node = jc.factorize.SVD(rank=2)(w)
    fast = jc.accelerate(tied)
    close(fast(node, x), tied(node.materialize(), x))
    assert [row.shape for row in fast.report(node, x).rows] == [(12, 2), (2, 10), (2, 10), (12, 2)]

    def conv(w, x):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "OIHW", "NCHW"))

    kernel, image = jnp.asarray(rng.normal(size=(3, 3, 4, 8)), jnp.float32), jnp.ones((2, 5, 5, 4))
    node = jc.factorize.SVD(rank=2)(kernel)

    def transposed(w, x):
        return conv(w.transpose(3, 2, 0, 1), x)

    fast = jc.accelerate(transposed)
    close(fast(node, image), transposed(node.materialize(), image))
    assert fast.report(node, image).rows[0].shape == (2, 4, 3, 3)


FALLBACKS = {
    "groups": (Int(bits=8, group_size=4), "groups along the contraction"),
    "scale by input": (Int(bits=8, axis=0), "vary along the contraction"),
    "affine": (Int(bits=8, symmetric=False), "do not fit into int8"),
    "codebook": (jc.share.KMeans(clusters=4), "Codebook is made dense"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_stays_float_says_so(name, rng):
    method, reason = FALLBACKS[name]
    w, x = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32), jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    node = method(w)
    fns = [
        jc.quantize.activations(lambda p, x: x @ p, node, x, mode=m, weight_bits=None) for m in ("integer", "simulate")
    ]
    assert reason in fns[0].report().rows[0].how
    q, s = grid(np.asarray(x), None)
    for fn in fns:
        close(fn(node, x), (q * s).astype(np.float32) @ np.asarray(node.materialize()))


CHANGED = {
    "changed by 'mul'": lambda p, x: x @ (0.5 * p),
    "changed by 'tanh'": lambda p, x: x @ jnp.tanh(p),
    "taken apart": lambda p, x: x @ p[:, :2],
}


@pytest.mark.parametrize("how", CHANGED)
def test_what_the_function_does_to_a_weight_first_is_told(how):
    node, x = jc.factorize.SVD(rank=1)(jnp.ones((8, 4))), jnp.ones((3, 8))
    fast = jc.accelerate(CHANGED[how])
    close(fast(node, x), CHANGED[how](node.materialize(), x))
    assert [row.how for row in fast.report(node, x).rows] == [f"dense: {how} before the product"]


def test_sparse_and_affine_codes_are_multiplied_too(rng):
    w, x = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32), jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    for method in (jc.chain(jc.prune.Magnitude(sparsity=0.5), Int(bits=8)), Int(bits=4, symmetric=False), Int(bits=1)):
        node = method(w)
        fn = jc.quantize.activations(lambda p, x: x @ p, node, x)
        assert "int32" in fn.report().rows[0].how
        q, s = grid(np.asarray(x), None)
        close(fn(node, x), (q * s).astype(np.float32) @ np.asarray(node.materialize()))


def test_products_between_activations_and_parameters_alone_stay(rng):
    params = {"a": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32), "b": jnp.ones((4, 4))}
    x = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)

    def fn(p, x):
        return (x @ x.T) @ (x.T @ x), p["a"] @ p["b"], p["a"][jnp.argmax(x)]

    quantized = jc.quantize.activations(fn, params, x)
    assert not quantized.report().rows
    for a, b in zip(quantized(params, x), fn(params, x), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bits_by_path(rng):
    params = {n: jnp.asarray(rng.normal(size=(8, 8)), jnp.float32) for n in ("first", "second")}
    x = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    fn = jc.quantize.activations(lambda p, x: (x @ p["first"]) @ p["second"], params, x, bits={"second": 4})
    assert [("int32" in r.how, r.path) for r in fn.report().rows] == [(False, "first"), (True, "second")]
    alone = jc.quantize.activations(lambda p, x: x @ p, params["second"], bits=4)
    np.testing.assert_array_equal(fn(params, x), alone(params["second"], x @ params["first"]))


def test_derivatives_of_ones_own_are_kept_or_said_to_be_lost(rng):
    w, x = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32), jnp.ones((2, 4))

    @jax.custom_vjp
    def doubled(w):
        return w

    doubled.defvjp(lambda w: (w, None), lambda _, g: (2 * g,))

    @jax.custom_vjp
    def layer(w, x):
        return x @ w

    layer.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T))
    kept = jc.quantize.activations(lambda w, x: x @ doubled(w), w, mode="simulate")
    plain = jc.quantize.activations(lambda w, x: x @ w, w, mode="simulate")
    gradient = [jax.grad(lambda w, fn=fn: fn(w, x).sum())(w) for fn in (kept, plain)]
    close(gradient[0], 2 * gradient[1])
    lost = jc.quantize.activations(layer, w, x)
    assert "lost" in str(lost.report()) and "int32" in str(lost.report())


def test_remat_and_branches_keep_their_kind(rng):
    w, x = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32), jnp.ones((2, 4))

    def fn(w, x):
        y = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x)
        return jax.lax.cond(x.sum() > 0, lambda w: y @ w, lambda w: y @ w.T, w)

    quantized = jc.quantize.activations(fn, w, x)
    jaxpr = str(jax.make_jaxpr(quantized)(w, x))
    assert "checkpoint" in jaxpr or "remat" in jaxpr
    assert "cond" in jaxpr
    assert len(quantized.report().rows) == 3


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"bits": 17}, "17"), ({"bits": {"v": 8}}, "no such parameter"), ({"mode": "fast"}, "mode='fast'"),
        ({"scale": "column"}, "scale='column'"), ({"weight_bits": 1}, "weight_bits"),
        ({"stats": {"w": jnp.ones(3)}}, "w: found a range of shape"), ({"stats": {}, "scale": "row"}, "static"),
    ],
)  # fmt: skip
def test_errors_name_what_was_found(known, message):
    with pytest.raises(ValueError, match=message):
        jc.quantize.activations(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))}, **known)


@pytest.mark.parametrize("method", [
    jc.factorize.SVD(rank=2),
    jc.residual(jc.quantize.Int(4), jc.factorize.SVD(rank=1)),
    jc.chain(jc.factorize.SVD(rank=2), jc.quantize.Int(8)),
])  # fmt: skip
@pytest.mark.parametrize("transposed", [False, True])
def test_one_factor_for_all_layers_of_a_scan(method, transposed):
    params = {"w": jax.random.normal(jax.random.key(0), (3, 8, 8)) * 0.3}
    x = jax.random.normal(jax.random.key(1), (5, 8))

    def fn(p, x):
        turn = lambda h, w: (jnp.tanh(h @ (w.T if transposed else w)), None)  # noqa: E731
        return jax.lax.scan(turn, x, p["w"])[0]

    tree = jc.compress(params, jc.plan(params, [("w", method)]))
    fast = jc.accelerate(fn)
    np.testing.assert_allclose(fast(tree, x), fn(jc.materialize(tree), x), rtol=1e-5, atol=1e-5)
    assert min(min(row.shape) for row in fast.report(tree, x).rows) < 8
    over_outputs = lambda p, x: jax.lax.scan(lambda c, w: (c, x @ w), 0, p["w"].transpose(2, 1, 0))[1]  # noqa: E731
    np.testing.assert_allclose(
        jc.accelerate(over_outputs)(tree, jnp.ones((5, 8))), over_outputs(jc.materialize(tree), jnp.ones((5, 8))),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
