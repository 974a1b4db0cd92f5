"""Corrected biases keep mean outputs; equalized layers keep the function and share their ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc

Q = jc.quantize


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def layer(shape, seed):
    return {"kernel": normal(shape, seed) / np.sqrt(np.prod(shape[:-1])), "bias": normal(shape[-1:], seed + 50)}


def mlp(params, x):
    for name in ("a", "b"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["c"]["kernel"] + params["c"]["bias"]


def mlp_params():
    return {"a": layer((6, 16), 0), "b": layer((16, 12), 1), "c": layer((12, 4), 2)}


def conv(params, x):
    x = jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    return x + params["bias"]


def compressed(fn, params, data, bits=3):
    plan = jc.plan(params, [(".*kernel", Q.Int(bits=bits))])
    stats = jc.calibrate(fn, params, [data], statistics=("sum", "count"))
    return jc.compress(params, plan), stats


def dense_fn(params, x):
    return jnp.einsum("bf,fhd->bhd", x, params["kernel"]) + params["bias"]


@pytest.mark.parametrize(
    ("fn", "shape", "bias", "data"),
    [
        (lambda p, x: x @ p["kernel"] + p["bias"], (6, 4), (4,), (50, 6)),
        (conv, (3, 3, 2, 8), (8,), (2, 6, 6, 4)),
        (dense_fn, (6, 2, 3), (2, 3), (50, 6)),
        (lambda p, x: jnp.einsum("bhd,hdf->bf", x, p["kernel"]) + p["bias"], (2, 3, 5), (5,), (50, 2, 3)),
    ],
    ids=["dense", "grouped-convolution", "heads-out", "heads-in"],
)
def test_a_corrected_bias_gives_the_outputs_their_mean(fn, shape, bias, data):
    params, x = {"kernel": normal(shape, 0), "bias": normal(bias, 1)}, normal(data, 2) + 1.5
    after, stats = compressed(fn, params, x)
    corrected = jc.rewrite.correct_biases(params, after, stats)
    positions = tuple(range(x.ndim - 1)) if len(bias) == 1 and x.ndim != 3 else (0,)
    mean = fn(params, x).mean(positions)
    np.testing.assert_allclose(fn(jc.materialize(corrected), x).mean(positions), mean, atol=2e-5)
    assert float(jnp.abs(fn(jc.materialize(after), x).mean(positions) - mean).max()) > 0.01
    assert corrected["kernel"] is after["kernel"]


def test_correction_through_layers_stacked_for_scan():
    params, x = {"kernel": normal((3, 5, 5), 0) / 2, "bias": normal((3, 5), 1)}, normal((40, 5), 2) + 1

    def fn(p, x):
        return jax.lax.scan(lambda h, p: (jnp.tanh(h @ p["kernel"] + p["bias"]), h), x, p)[0]

    plan = jc.plan(params, [("kernel", jc.stacked(Q.Int(bits=3)))])
    after = jc.compress(params, plan)
    stats = jc.calibrate(fn, params, [x], statistics=("sum", "count"))
    corrected = jc.rewrite.correct_biases(params, after, stats)
    h = x
    for i in range(3):
        shift = h.mean(0) @ (after["kernel"].materialize()[i] - params["kernel"][i])
        np.testing.assert_allclose(corrected["bias"][i], params["bias"][i] - shift, atol=1e-5)
        h = jnp.tanh(h @ params["kernel"][i] + params["bias"][i])


def test_correction_says_what_is_missing():
    params, x = mlp_params(), normal((20, 6), 3)
    after, stats = compressed(mlp, params, x)
    with pytest.raises(ValueError, match="no kernel has both statistics and a bias"):
        jc.rewrite.correct_biases({"a/kernel": params["a"]["kernel"]}, {"a/kernel": after["a"]["kernel"]}, stats)
    bare = {"a/kernel": params["a"]["kernel"], "shift": jnp.ones(12)}
    groups = {"hand": jc.trace.Group(12, (("a/kernel", 1), ("shift", 0)))}
    with pytest.raises(ValueError, match=r"shift: found shape \(12,\), expected \(16,\), that of a/kernel"):
        jc.rewrite.correct_biases(bare, bare | {"a/kernel": after["a"]["kernel"]}, stats, groups)
    with pytest.raises(ValueError, match="a/kernel: needs 'sum'"):
        jc.rewrite.correct_biases(params, after, jc.calibrate(mlp, params, [x], statistics=("absmax",)))


PAIRS = {("a/kernel", "a/bias"): ["b/kernel"], ("b/kernel", "b/bias"): ["c/kernel"]}


def between(params, pairs):
    return jc.trace.Groups.between(params, pairs)


def first_of(params):
    return between(params, {("a/kernel", "a/bias"): ["b/kernel"]})


def unequal(params, seed=9):
    """The same function with channels of very different ranges."""
    for first, second in (("a", "b"), ("b", "c")):
        s = jnp.exp(2 * normal(params[first]["bias"].shape, seed))
        params[first] = {k: v * s for k, v in params[first].items()}
        params[second] = {**params[second], "kernel": params[second]["kernel"] / s[:, None]}
    return params


def ranges(params, first, second):
    return jnp.abs(params[first]["kernel"]).max(0), jnp.abs(params[second]["kernel"]).max(1)


def test_equalized_layers_keep_the_function_and_have_equal_ranges():
    params, x = unequal(mlp_params()), normal((30, 6), 4)
    equal = jax.jit(lambda p: jc.rewrite.equalize(p, between(p, PAIRS), rounds=50))(params)
    np.testing.assert_allclose(mlp(equal, x), mlp(params, x), rtol=1e-4, atol=1e-4)
    for first, second in (("a", "b"), ("b", "c")):
        made, used = ranges(equal, first, second)
        np.testing.assert_allclose(made, used, rtol=1e-3)
        assert float(jnp.abs(jnp.log(jnp.divide(*ranges(params, first, second)))).max()) > 1

    def error(p):
        plan = jc.plan(p, [(".*kernel", Q.Int(bits=8, axis=None))])
        return float(jnp.square(mlp(jc.materialize(jc.compress(p, plan)), x) - mlp(params, x)).mean())

    assert error(equal) < 0.3 * error(params)


def test_one_pair_takes_the_root_of_the_product():
    params = unequal(mlp_params())
    made, used = ranges(params, "a", "b")
    once = jc.rewrite.equalize(params, first_of(params), rounds=1)
    for found in ranges(once, "a", "b"):
        np.testing.assert_allclose(found, jnp.sqrt(made * used), rtol=1e-5)
    assert once["c"] is not None
    np.testing.assert_array_equal(once["c"]["kernel"], params["c"]["kernel"])


def test_groups_of_a_convolutional_network():
    """Flattened places times channels, and two kernels that use one dimension."""
    params = {
        "conv": layer((3, 3, 2, 6), 0), "left": layer((4 * 4 * 6, 5), 1), "right": layer((4 * 4 * 6, 3), 2),
    }  # fmt: skip
    params["conv"] = {k: v * jnp.exp(2 * normal((6,), 8)) for k, v in params["conv"].items()}
    x = normal((7, 6, 6, 2), 3)

    def fn(p, x):
        h = jax.lax.conv_general_dilated(
            x, p["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = jax.nn.leaky_relu(h + p["conv"]["bias"], 0.1).reshape(len(x), -1)
        return [h @ p[name]["kernel"] + p[name]["bias"] for name in ("left", "right")]

    groups = jc.trace.coupling(fn, params, x)
    group = next(g for g in groups.values() if ("conv/bias", 0) in g.members and g.consumers)
    equal = jc.rewrite.equalize(params, {"hidden": group})
    for a, b in zip(fn(equal, x), fn(params, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    made = jnp.abs(equal["conv"]["kernel"]).max((0, 1, 2))
    used = jnp.concatenate([equal[n]["kernel"].reshape(16, 6, -1) for n in ("left", "right")], -1)
    np.testing.assert_allclose(made, jnp.abs(used).max((0, 2)), rtol=1e-5)


def test_channels_of_zeros_stay_and_errors_name_the_path():
    params = mlp_params()
    params["a"]["kernel"] = params["a"]["kernel"].at[:, 3].set(0.0)
    equal = jc.rewrite.equalize(params, first_of(params))
    np.testing.assert_array_equal(equal["b"]["kernel"][3], params["b"]["kernel"][3])
    with pytest.raises(ValueError, match="a/weight: there is no such parameter"):
        between(params, {"a/weight": ["b/kernel"]})
    with pytest.raises(
        ValueError, match=r"c/kernel: found axis -2 of shape .*, expected length 16, that of the last axis of a/kernel"
    ):
        between(params, {"a/kernel": ["c/kernel"]})
    normed = {**params, "scale": jnp.ones(16), "shift": jnp.ones(16)}

    def fn(p, x):
        h = x @ p["a"]["kernel"] + p["a"]["bias"]
        return (h * p["scale"] + p["shift"]) @ p["b"]["kernel"]

    groups = jc.trace.coupling(fn, normed, normal((4, 6), 0))
    group = next(g for g in groups.values() if ("scale", 0) in g.members)
    with pytest.raises(ValueError, match="fold normalization into the kernels first"):
        jc.rewrite.equalize(normed, {"hidden": group})
