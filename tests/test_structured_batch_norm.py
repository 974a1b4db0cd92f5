"""Folding is exact; statistics are those of the data; corrected biases keep the means."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc


def statistics(rng, n):
    drawn = {name: jnp.asarray(rng.normal(size=n), jnp.float32) for name in ("scale", "offset", "mean")}
    return drawn | {"var": jnp.asarray(rng.uniform(0.2, 2, size=n), jnp.float32)}


def normalized(y, s, epsilon):
    return (y - s["mean"]) / jnp.sqrt(s["var"] + epsilon) * s["scale"] + s["offset"]


LAYERS = {
    "dense": (nn.Dense(6), (5, 4), -1),
    "convolution": (nn.Conv(6, (3, 3)), (2, 5, 5, 3), -1),
    "strided": (nn.Conv(6, (3, 3), strides=2, padding="VALID"), (2, 7, 7, 3), -1),
    "depthwise": (nn.Conv(6, (3, 3), feature_group_count=3), (2, 5, 5, 3), -1),
    "one axis": (nn.Conv(6, (3,)), (2, 9, 3), -1),
    "transposed": (nn.ConvTranspose(6, (3, 3), strides=(2, 2)), (2, 5, 5, 3), -1),
    "transposed kernel": (nn.ConvTranspose(6, (3, 3), strides=(2, 2), transpose_kernel=True), (2, 5, 5, 3), -2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_folding_is_exact(rng, name):
    layer, shape, axis = LAYERS[name]
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = layer.init(jax.random.key(0), x)["params"]
    params["bias"] = jnp.asarray(rng.normal(size=6), jnp.float32)
    s = statistics(rng, 6)
    expected = normalized(layer.apply({"params": params}, x), s, 1e-3)
    kernel, bias = jc.rewrite.fold_batch_norm(params["kernel"], params["bias"], **s, epsilon=1e-3, axis=axis)
    found = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


class Net(nn.Module):
    """Convolution and dense, each with a batch norm; the dense layer has a bias of its own."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(5, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dense(4)(x.mean((1, 2)))
        return nn.BatchNorm(use_running_average=not train, momentum=0.8)(x)


@pytest.fixture
def net(rng):
    x = jnp.asarray(rng.normal(size=(12, 6, 6, 2)), jnp.float32)
    variables = Net().init(jax.random.key(0), x)
    leaves, treedef = jax.tree.flatten(variables)
    leaves = [jnp.asarray(rng.uniform(0.3, 1.5, size=v.shape), jnp.float32) for v in leaves]
    return treedef.unflatten(leaves), x


def by_hand(variables):
    """The layers of the network and their norms."""
    norm = [(f"params/BatchNorm_{i}/scale", f"params/BatchNorm_{i}/bias") for i in range(2)]
    norm = [
        (*paths, *(f"batch_stats/BatchNorm_{i}/{name}" for name in ("mean", "var"))) for i, paths in enumerate(norm)
    ]
    first, second = ("params/Conv_0/kernel", *norm[0]), ("params/Dense_0/kernel", "params/Dense_0/bias", *norm[1])
    return jc.trace.Groups.between(variables, {first: [], second: []})


@pytest.mark.parametrize("read", [True, False])
def test_folded_variables_run_in_the_same_model(net, read):
    variables, x = net
    groups = jc.trace.coupling(lambda v, x: Net().apply(v, x), variables, x) if read else by_hand(variables)
    folded = jc.rewrite.fold_batch_norms(variables, groups)
    np.testing.assert_allclose(Net().apply(folded, x), Net().apply(variables, x), rtol=1e-4, atol=1e-5)
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, variables)
    np.testing.assert_array_equal(folded["params"]["BatchNorm_1"]["bias"], 0)
    np.testing.assert_array_equal(folded["params"]["BatchNorm_0"]["scale"], 1)
    np.testing.assert_array_equal(folded["batch_stats"]["BatchNorm_0"]["mean"], 0)


def updates(variables):
    def update(stats, x):
        _, new = Net().apply(variables | {"batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        return new["batch_stats"]

    return update


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_statistics_of_the_first_norm_are_those_of_all_data(net, momentum):
    variables, x = net
    old = variables["batch_stats"]
    out = nn.Conv(5, (3, 3), use_bias=False).apply({"params": variables["params"]["Conv_0"]}, x)
    for split in ([12], [6, 6], [1, 2, 9]):
        batches = [x[sum(split[:i]) :][:n] for i, n in enumerate(split)]
        new = jc.rewrite.reestimate(updates(variables), old, batches, momentum=momentum)["BatchNorm_0"]
        np.testing.assert_allclose(new["mean"], out.mean((0, 1, 2)), rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(new["var"], out.var((0, 1, 2)), rtol=1e-4)


def test_one_batch_gives_evaluation_what_training_sees(net):
    variables, x = net
    new = jc.rewrite.reestimate(updates(variables), variables["batch_stats"], [(x,)])
    trained, _ = Net().apply(variables, x, train=True, mutable=["batch_stats"])
    found = Net().apply(variables | {"batch_stats": new}, x)
    np.testing.assert_allclose(found, trained, rtol=1e-3, atol=1e-4)


def test_reestimation_mends_a_pruned_network(net, rng):
    variables, x = net
    kernel = jnp.asarray(rng.normal(size=(3, 3, 2, 5)), jnp.float32)
    variables["params"]["Conv_0"]["kernel"] = kernel
    variables["batch_stats"] = jc.rewrite.reestimate(updates(variables), variables["batch_stats"], [x])
    pruned = jc.prune.Magnitude(sparsity=0.5)(kernel).materialize()
    params = variables["params"] | {"Conv_0": {"kernel": pruned}}
    stale = {"params": params, "batch_stats": variables["batch_stats"]}
    fresh = {"params": params, "batch_stats": jc.rewrite.reestimate(updates(stale), stale["batch_stats"], [x])}
    for variables_, expected in ((stale, False), (fresh, True)):
        y = Net().apply(variables_, x)
        offset, scale = params["BatchNorm_1"]["bias"], params["BatchNorm_1"]["scale"]
        close = jnp.allclose(y.mean(0), offset, atol=1e-3) and jnp.allclose(y.std(0), scale, rtol=1e-2)
        assert bool(close) == expected


def test_errors_name_what_is_wrong(net):
    variables, x = net
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(4,\)"):
        jc.rewrite.fold_batch_norm(jnp.ones((2, 4)), 0, 1, 0, jnp.ones(3), jnp.ones(3))
    mean, var = ("batch_stats/BatchNorm_0/mean", 0), ("batch_stats/BatchNorm_0/var", 0)
    with pytest.raises(
        ValueError, match=r"params/Conv_7/kernel: the group 'g' names it, but there is no such parameter"
    ):
        jc.rewrite.fold_batch_norms(variables, {"g": jc.trace.Group(5, (("params/Conv_7/kernel", 3), mean, var))})
    with pytest.raises(ValueError, match="params/Conv_0/kernel: neither the layer nor its norm has a bias"):
        jc.rewrite.fold_batch_norms(variables, {"g": jc.trace.Group(5, (("params/Conv_0/kernel", 3), mean, var))})
    with pytest.raises(ValueError, match="no group is written by one kernel and one batch norm"):
        jc.rewrite.fold_batch_norms(variables, {"g": jc.trace.Group(5, (("params/Conv_0/kernel", 3), mean))})
    with pytest.raises(ValueError, match="no batches"):
        jc.rewrite.reestimate(updates(variables), variables["batch_stats"], [])
    with pytest.raises(ValueError, match="mean: the statistic does not move"):
        jc.rewrite.reestimate(lambda s, x: s, {"mean": jnp.ones(2)}, [x])
    with pytest.raises(ValueError, match="found a variance without a/mean"):
        jc.rewrite.reestimate(lambda s, x: s, {"a": {"var": jnp.ones(2)}}, [x])


def mlp(p, x):
    return jax.nn.relu(x @ p["one"]["kernel"] + p["one"]["bias"]) @ p["two"]["kernel"] + p["two"]["bias"]


@pytest.fixture
def perceptron(rng):
    shapes = {"one": {"kernel": (4, 8), "bias": (8,)}, "two": {"kernel": (8, 3), "bias": (3,)}}
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    return params, jnp.asarray(rng.normal(size=(50, 4)) + 1, jnp.float32)


@pytest.mark.parametrize(
    "method", [jc.prune.Magnitude(sparsity=0.5), jc.quantize.Int(bits=3), jc.factorize.SVD(rank=1)]
)
def test_corrected_biases_keep_the_mean_outputs(perceptron, method):
    params, x = perceptron
    stats = jc.calibrate(mlp, params, [(x[:20],), (x[20:],)], progress=False)
    small = jc.compress(params, jc.plan(params, [("two/kernel", method)]))
    fixed = jc.rewrite.correct_biases(params, small, stats)
    assert isinstance(fixed["two"]["kernel"], type(small["two"]["kernel"]))
    means = [mlp(jc.materialize(p), x).mean(0) for p in (params, small, fixed)]
    np.testing.assert_allclose(means[2], means[0], atol=1e-5)
    assert not np.allclose(means[1], means[0], atol=1e-2)
    np.testing.assert_array_equal(fixed["one"]["bias"], params["one"]["bias"])


def test_convolutions_are_corrected_too(rng):
    params = {
        "kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=4), jnp.float32),
    }

    def conv(p, x):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=dims) + p["bias"]

    x = jnp.asarray(rng.normal(size=(3, 5, 5, 2)) + 1, jnp.float32)
    stats = jc.calibrate(conv, params, [(x,)], progress=False)
    small = params | {"kernel": jc.prune.Magnitude(sparsity=0.5)(params["kernel"]).materialize()}
    fixed = jc.rewrite.correct_biases(params, small, stats)
    np.testing.assert_allclose(conv(fixed, x).mean((0, 1, 2)), conv(params, x).mean((0, 1, 2)), atol=1e-5)


def test_a_compressed_bias_cannot_be_corrected(perceptron):
    params, x = perceptron
    stats = jc.calibrate(mlp, params, [(x,)], progress=False)
    small = jc.compress(params, jc.plan(params, [("two/.*", jc.prune.Magnitude(sparsity=0.5))]))
    with pytest.raises(ValueError, match="two/bias: found no dense bias for two/kernel"):
        jc.rewrite.correct_biases(params, small, stats)
