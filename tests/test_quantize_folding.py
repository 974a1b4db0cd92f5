"""Scales, norms and rotations folded into weights: the function stays, and its weights are easier to quantize."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from jcompress import rewrite

Q = jc.quantize
WIDTH, HEADS, SIZE, HIDDEN, WORDS, LAYERS = 32, 4, 8, 48, 40, 2


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)


def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def transformer(params, tokens):
    """Norms by root mean square, attention with two heads of values for four of queries, a gate, tied embeddings."""
    x = params["embed"][tokens]
    for i in range(LAYERS):
        p = params[f"layer{i}"]
        h = norm(x, p["before"])
        q, k = jnp.einsum("btd,dhs->bths", h, p["q"]), jnp.einsum("btd,dhs->bths", h, p["k"])
        v = (h @ p["v"] + p["v_bias"]).reshape(*h.shape[:2], 2, SIZE).repeat(2, axis=2)
        a = jax.nn.softmax(jnp.einsum("bths,buhs->bhtu", q, k) / SIZE**0.5)
        x = x + jnp.einsum("bhtu,buhs->bths", a, v).reshape(*h.shape[:2], HEADS * SIZE) @ p["o"] + p["o_bias"]
        h = norm(x, p["after"])
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
    return norm(x, params["last"]) @ params["embed"].T


def parameters(rng, spread=1.0):
    """Norms whose scales differ, and a few channels of the stream that are large."""

    def scale():
        return jnp.asarray(np.exp(spread * rng.normal(size=WIDTH)), jnp.float32)

    def layer():
        shapes = {
            "q": (WIDTH, HEADS, SIZE), "k": (WIDTH, HEADS, SIZE), "v": (WIDTH, 2 * SIZE), "o": (HEADS * SIZE, WIDTH),
            "gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH),
        }  # fmt: skip
        biases = {"v_bias": normal(rng, 2 * SIZE), "o_bias": normal(rng, WIDTH)}
        return {"before": scale(), "after": scale()} | biases | {n: normal(rng, *s) for n, s in shapes.items()}

    return {"embed": normal(rng, WORDS, WIDTH), "last": scale()} | {f"layer{i}": layer() for i in range(LAYERS)}


@pytest.fixture
def tokens(rng):
    return jnp.asarray(rng.integers(WORDS, size=(8, 12)))


def of_layers(pairs):
    """Pairs of one layer, for all of them."""

    def named(x, i):
        return (f"layer{i}/{x[0]}", x[1]) if isinstance(x, tuple) else f"layer{i}/{x}"

    return {
        tuple(f"layer{i}/{m}" for m in makers): [named(r, i) for r in readers]
        for i in range(LAYERS)
        for makers, readers in pairs.items()
    }


READ = [("q", 0), ("k", 0), "v"]
NORMS = of_layers({("before",): READ, ("after",): ["gate", "up"]})
STREAM = (("embed", *(f"layer{i}/{n}" for i in range(LAYERS) for n in ("o", "o_bias", "down"))),)
STREAM = {STREAM[0]: [r for readers in NORMS.values() for r in readers]}
HEADS_OF_VALUES = of_layers({("v", "v_bias"): ["o"]})


def between(params, pairs, **kwargs):
    return jc.trace.Groups.between(params, pairs, **kwargs)


def without_scales(params):
    """Norm scales in the kernels; the last one stays, since the table that reads it makes the stream as well."""
    return rewrite.fold_norms(params | {"last": jnp.ones(WIDTH)}, between(params, NORMS))


def error(params, tokens, want, method, names="q|k|v|o|gate|up|down"):
    """Of the outputs, with matrices of the layers quantized."""
    rules = [(rf"layer\d/({names})", method), (".*", None)]
    small = jax.jit(lambda p: jc.materialize(jc.compress(p, jc.plan(p, rules))))(params)
    return float(jnp.square(transformer(small, tokens) - want).mean())


def test_folded_norms_keep_the_function(rng, tokens):
    params = parameters(rng)
    folded = jax.jit(lambda p: rewrite.fold_norms(p, between(p, NORMS)))(params)
    want = transformer(params, tokens)
    np.testing.assert_allclose(transformer(folded, tokens), want, atol=2e-5 * float(jnp.abs(want).max()))
    for i in range(LAYERS):
        assert (folded[f"layer{i}"]["before"] == 1).all() and (folded[f"layer{i}"]["after"] == 1).all()
    assert jax.tree.structure(folded) == jax.tree.structure(params)


def test_the_bias_of_a_norm_goes_into_the_bias_of_its_readers(rng):
    stack = {
        "norm": {"scale": normal(rng, 3, 8), "bias": normal(rng, 3, 8)},
        "a": {"kernel": normal(rng, 3, 8, 2, 4), "bias": normal(rng, 3, 2, 4)},
        "b": {"kernel": normal(rng, 3, 8, 5), "shift": normal(rng, 3, 5)},
    }
    x = normal(rng, 6, 8)

    def fn(p, x):
        def layer(_, p):
            h = jax.nn.standardize(x) * p["norm"]["scale"] + p["norm"]["bias"]
            a = jnp.einsum("bi,ihd->bhd", h, p["a"]["kernel"]) + p["a"]["bias"]
            return None, (a, h @ p["b"]["kernel"] + p["b"]["shift"])

        return jax.lax.scan(layer, None, p)[1]

    pairs = {("norm/scale", "norm/bias"): [("a/kernel", 1), "b/kernel"]}
    folded = rewrite.fold_norms(stack, between(stack, pairs | {("b/kernel", "b/shift"): []}))
    assert (folded["norm"]["scale"] == 1).all() and not folded["norm"]["bias"].any()
    for a, b in zip(fn(folded, x), fn(stack, x), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(ValueError, match="b/kernel: found no bias that takes the norm's"):
        rewrite.fold_norms(stack, between(stack, pairs))
    with pytest.raises(ValueError, match=r"b/shift: found shape \(3, 5\), expected \(3, 2, 4\) as outputs of a/kernel"):
        bare = stack | {"a": {"kernel": stack["a"]["kernel"]}}
        groups = between(bare, pairs) | {"other": jc.trace.Group(8, (("a/kernel", 1), ("b/shift", 1)))}
        rewrite.fold_norms(bare, groups)
    with pytest.raises(ValueError, match=r"a/kernel: found axis -2 of shape \(3, 8, 2, 4\), expected length 8"):
        between(stack, {"norm/scale": ["a/kernel"]})
    square = stack | {"b": {"kernel": jnp.ones((3, 8, 8))}}
    mixed = between(square, {("norm/scale", "b/kernel"): [("a/kernel", 1)]})
    with pytest.raises(ValueError, match=r"found b/kernel, norm/scale among what writes it, expected the scale of one"):
        rewrite.fold_norms(square, mixed)


def test_a_folded_rotation_keeps_the_function_and_hides_outliers(rng, tokens):
    params = parameters(rng, spread=0.0)
    params["embed"] = params["embed"].at[:, 5].divide(20.0)
    for i in range(LAYERS):  # a channel of the stream that is small, and read with large numbers, which set the scales
        layer = params[f"layer{i}"]
        layer |= {name: layer[name].at[..., 5].divide(20.0) for name in ("o", "o_bias", "down")}
        layer |= {name: layer[name].at[5].mul(20.0) for name in ("gate", "up", "v", "q", "k")}
    plain = without_scales(params)
    turned = jax.jit(lambda p: rewrite.fold_rotations(p, between(p, STREAM), jax.random.key(0)))(plain)
    want = transformer(plain, tokens)
    np.testing.assert_allclose(transformer(turned, tokens), want, atol=5e-5 * float(jnp.abs(want).max()))
    for path in ("gate", "up", "v"):
        before, after = (p["layer0"][path] for p in (plain, turned))
        assert float(jnp.abs(after).max()) < 0.4 * float(jnp.abs(before).max())
        np.testing.assert_allclose(jnp.linalg.norm(after), jnp.linalg.norm(before), rtol=1e-5)
    assert error(turned, tokens, want, Q.Int(4)) < 0.5 * error(plain, tokens, want, Q.Int(4))
    assert jc.nbits(turned) == jc.nbits(params)


def test_heads_are_rotated_alike_where_they_share_values(rng, tokens):
    params = parameters(rng, spread=0.0)
    for i in range(LAYERS):
        layer = params[f"layer{i}"]  # channels of values that are large, and read by little
        layer["v"] = layer["v"].at[:, jnp.array([2, 10])].mul(8.0)
        layer["o"] = layer["o"].reshape(4, SIZE, WIDTH).at[:, 2].divide(8.0).reshape(-1, WIDTH)
    turned = rewrite.fold_rotations(params, between(params, HEADS_OF_VALUES, size=SIZE), jax.random.key(0))
    want = transformer(params, tokens)
    np.testing.assert_allclose(transformer(turned, tokens), want, atol=5e-5 * float(jnp.abs(want).max()))
    errors = [error(p, tokens, want, Q.Int(4, axis=None), "v|o") for p in (turned, params)]
    assert errors[0] < 0.75 * errors[1]
    whole = rewrite.fold_rotations(
        params, between(params, {("layer0/gate", "layer0/up"): ["layer0/down"]}), jax.random.key(0)
    )
    assert float(jnp.abs(transformer(whole, tokens) - want).max()) > 0.1  # an activation lies between


def test_rotating_twice_by_other_signs_is_still_the_function(rng, tokens):
    params = without_scales(parameters(rng))
    first, second = (rewrite.fold_rotations(params, between(params, STREAM), jax.random.key(seed)) for seed in (0, 1))
    assert bool((first["embed"] != second["embed"]).any())
    both = rewrite.fold_rotations(first, between(first, STREAM), jax.random.key(1))
    want = transformer(params, tokens)
    np.testing.assert_allclose(transformer(both, tokens), want, atol=5e-5 * float(jnp.abs(want).max()))


SCALED = of_layers({("before",): READ, ("after",): ["gate", "up"], ("up",): ["down"]})


def test_folded_scales_keep_the_function_and_serve_the_channels_that_matter(rng, tokens):
    params = parameters(rng, spread=2.0)
    stats = jc.calibrate(transformer, params, [tokens], statistics=["gram"])
    method = Q.AWQ(Q.Int(3), points=10)
    folded = jax.jit(lambda p: rewrite.fold_scales(p, between(p, SCALED), stats, method))(params)
    want = transformer(params, tokens)
    np.testing.assert_allclose(transformer(folded, tokens), want, atol=2e-5 * float(jnp.abs(want).max()))
    assert error(folded, tokens, want, method.grid) < 0.7 * error(params, tokens, want, method.grid)
    assert jc.nbits(folded) == jc.nbits(params)


def test_folded_scales_give_the_codes_of_nodes_that_keep_them(rng):
    params = {"a": normal(rng, 16, 24), "bias": jnp.abs(normal(rng, 24)), "b": normal(rng, 24, 8)}
    x = normal(rng, 64, 16) * jnp.exp(normal(rng, 16) * 4)

    def fn(p, x):
        return jax.nn.relu(x @ p["a"] + p["bias"]) @ p["b"]

    stats = jc.calibrate(fn, params, [x], statistics=["gram"])
    method = Q.AWQ(Q.Int(3), points=8)
    node = jc.compress(params, jc.plan(params, [("b", method)]), stats=stats)["b"]
    folded = rewrite.fold_scales(params, jc.trace.coupling(fn, params, x).prunable, stats, method)
    codes = Q.Int(3)(folded["b"]).codes
    assert float((codes == node.values.codes).mean()) > 0.98  # scales of nodes are rounded to bfloat16
    scale = 1 / node.scale.materialize().astype(jnp.float32)[:, 0]
    np.testing.assert_allclose(folded["a"] * scale, params["a"], rtol=0.01)
    np.testing.assert_allclose(fn(folded, x), fn(params, x), rtol=1e-4, atol=1e-4)


def test_smoothing_may_end_in_a_kernel_too(rng, tokens):
    params = parameters(rng)
    stats = jc.calibrate(transformer, params, [tokens], statistics=["absmax"])
    moved = rewrite.smooth(params, between(params, of_layers({("up",): ["down"]})), stats)
    want = transformer(params, tokens)
    np.testing.assert_allclose(transformer(moved, tokens), want, atol=2e-5 * float(jnp.abs(want).max()))
    assert bool((moved["layer0"]["up"] != params["layer0"]["up"]).any())


def test_layers_stacked_for_scan_and_heads(rng):
    params = {"v": normal(rng, 3, 8, 2, 4), "o": normal(rng, 3, 2, 4, 8)}
    params["v"] = params["v"].at[..., 1].mul(jnp.array([9.0, 5.0, 3.0])[:, None, None])
    x = normal(rng, 32, 8)

    def fn(p, x):
        def layer(x, p):
            return jnp.tanh(jnp.einsum("bhd,hdo->bo", jnp.einsum("bi,ihd->bhd", x, p["v"]), p["o"])), None

        return jax.lax.scan(layer, x, p)[0]

    want = fn(params, x)
    stats = jc.calibrate(fn, params, [x], statistics=["gram"])
    groups = {name: group for name, group in jc.trace.coupling(fn, params, x).items() if group.prunable}
    groups = {name: group for name, group in groups.items() if {p for p, _ in group.producers} == {"v"}}
    assert len(groups) == 2, "heads and head dimension: channels are their pairs"
    scaled = rewrite.fold_scales(params, groups, stats, Q.AWQ(jc.stacked(Q.Int(3)), points=5))
    turned = rewrite.fold_rotations(
        params, {name: groups[name] for name in groups if "v[3]" in name}, jax.random.key(0)
    )
    for other in (scaled, turned):
        assert bool((other["v"] != params["v"]).any())
        np.testing.assert_allclose(fn(other, x), want, atol=1e-5)


def test_bfloat16_parameters_stay_so(rng):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {"a": normal(rng, 16, 16), "b": normal(rng, 16, 16)})
    turned = rewrite.fold_rotations(params, between(params, {"a": ["b"]}), jax.random.key(0))
    assert turned["a"].dtype == turned["b"].dtype == jnp.bfloat16
    product = [jnp.matmul(p["a"], p["b"], preferred_element_type=jnp.float32) for p in (params, turned)]
    np.testing.assert_allclose(product[1], product[0], atol=0.05)


def test_errors_name_the_path_and_the_fix(rng, tokens):
    params = parameters(rng)
    stats = jc.calibrate(transformer, params, [tokens], statistics=["gram"])
    node = Q.Int(4)(params["layer0"]["up"])
    compressed = params | {"layer0": params["layer0"] | {"up": node}}
    key, awq = jax.random.key(0), Q.AWQ(Q.Int(4))
    after = {"layer0/after": ["layer0/up"]}
    for message, fold in {
        "layer0/w: there is no such parameter": lambda: between(params, {"layer0/w": ["layer0/o"]}),
        "layer0/up: found a Quantized node, expected an array; fold first": lambda: rewrite.fold_norms(
            compressed, between(params, after)
        ),
        "fold_norms: none of 1 groups is both written and read": lambda: rewrite.fold_norms(
            params, between(params, {"last": []})
        ),
        r"layer0/q: found axis -2 of shape \(32, 4, 8\), expected length 32, that of the last axis of embed": (
            lambda: between(params, {"embed": ["layer0/q"]})
        ),
        r"layer0/o: found axis -2 of shape \(32, 32\), expected a multiple of size=7": lambda: between(
            {"v": jnp.ones((2, 14))} | params, {"v": ["layer0/o"]}, size=7
        ),
        r"embed: found shape \(40, 32\), expected an axis 2": lambda: between(params, {"last": [("embed", 2)]}),
        "size=0 must be positive": lambda: between(params, {"embed": ["layer0/up"]}, size=0),
        "the group 'part' fills axis 0 of shape .* in part": lambda: rewrite.fold_rotations(
            params, {"part": jc.trace.Group(2, (("last", 0),), maps={("last", 0): [0, 1] + [-1] * 30})}, key
        ),
        r"layer0/v: found shape \(32, 16\), expected \('...', 32\): its last axes make the 32 inputs of layer0/o": (
            lambda: rewrite.fold_scales(params, between(params, {"layer0/v": ["layer0/o"]}, size=16), stats, awq)
        ),
        r"layer0/up: found a Gram matrix of shape \(1, 32, 32\), expected \(1, 48, 48\) as that of layer0/down": (
            lambda: rewrite.fold_scales(
                params,
                {
                    "g": jc.trace.Group(
                        16,
                        (("last", 0),),
                        (("layer0/down", 0), ("layer0/up", 0)),
                        dict.fromkeys([("last", 0), ("layer0/up", 0)], np.arange(32) % 16)
                        | {("layer0/down", 0): np.arange(48) % 16},
                    )
                },
                stats,
                awq,
            )
        ),
        "layer0/up: needs 'gram'": lambda: rewrite.fold_scales(params, between(params, after), {}),
    }.items():
        with pytest.raises(ValueError, match=message):
            fold()
