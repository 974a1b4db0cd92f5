"""Networks that grow without a change, students made of a teacher's layers, and features by name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from losses import normal

import jcompress as jc


class Net(nn.Module):
    """Convolutions, batch norm, a concatenation, a flatten, and two dense layers."""

    widths: tuple = (4, 3, 5)

    @nn.compact
    def __call__(self, x):
        a = nn.Conv(self.widths[0], (3, 3), name="a")(x)
        a = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(a))
        b = nn.tanh(nn.Conv(self.widths[1], (1, 1), name="b")(x))
        y = jnp.concatenate([a, b], -1)
        y = nn.relu(nn.Dense(self.widths[2], name="c")(y.reshape(len(y), -1)))
        return nn.Dense(2, name="d")(y)


def _random(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, [jnp.abs(normal(i, *x.shape)) + 0.1 for i, x in enumerate(leaves)])


@pytest.mark.parametrize("key", [None, jax.random.key(0)], ids=["in turn", "drawn"])
def test_wider_linen_networks_compute_the_same(key):
    x = normal(0, 2, 4, 4, 3)
    params = _random(Net().init(jax.random.key(0), x))
    groups = jc.trace.coupling(lambda p, x: Net().apply(p, x), params, x)
    by_member = {m: name for name, g in groups.items() for m in g.members}
    new = {"params/a/kernel": 7, "params/b/kernel": 4, "params/c/kernel": 11}
    sizes = {by_member[path, 1 if path == "params/c/kernel" else 3]: n for path, n in new.items()}
    wide = jc.rewrite.widen(params, groups, sizes, key=key)
    assert wide["params"]["c"]["kernel"].shape == (16 * 11, 11)
    want = Net().apply(params, x)
    np.testing.assert_allclose(Net((7, 4, 11)).apply(wide, x), want, rtol=1e-4)
    assert wide["params"]["norm"]["scale"].shape == (7,)


def test_copies_of_all_units_are_exact_under_a_norm():
    def fn(p, x):
        h = x @ p["up"]
        h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)
        return jax.nn.gelu(h * p["scale"]) @ p["down"]

    params = {"up": normal(0, 3, 4), "scale": normal(1, 4), "down": normal(2, 4, 2)}
    x = normal(3, 5, 3)
    groups = jc.trace.coupling(fn, params, x)
    wide = jc.rewrite.widen(params, groups, {"up[1]": 12})
    np.testing.assert_allclose(fn(wide, x), fn(params, x), rtol=1e-4, atol=1e-5)


def test_what_cannot_grow_is_told():
    params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
    groups = jc.trace.coupling(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="it has 8 units"):
        jc.rewrite.widen(params, groups, {"up[1]": 7})
    with pytest.raises(ValueError, match="nothing"):
        jc.rewrite.widen(params, groups, {"nothing": 9})
    with pytest.raises(ValueError, match="no wider one"):
        shuffled = jc.trace.Group(2, (("up", 1),), (("down", 0),), {("up", 1): np.array([1, 0])})
        jc.rewrite.widen({"up": jnp.ones((1, 2)), "down": jnp.ones((2, 1))}, {"hidden": shuffled}, {"hidden": 3})


def test_deeper_networks_compute_the_same():
    x = jax.nn.relu(normal(0, 2, 5, 5, 3))
    for shape in ((3, 3, 3, 3), (1, 3, 3, 3)):
        kernel, bias = jc.rewrite.identity_layer(shape)
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias
        np.testing.assert_array_equal(jax.nn.relu(y), x)
    kernel, bias = jc.rewrite.identity_layer((3, 3))
    np.testing.assert_allclose(jax.nn.relu(x @ kernel + bias), x, rtol=1e-6)
    for shape in ((2, 2, 3, 3), (3, 4)):
        with pytest.raises(ValueError, match="expected as many"):
            jc.rewrite.identity_layer(shape)


def test_a_student_of_some_layers():
    layer = {"kernel": 1}
    tree = {"encoder": {f"layer_{i}_x": {**layer, "n": i} for i in range(4)} | {"norm": 9}, "head": 3}
    found = jc.rewrite.take_layers(tree, r"encoder/layer_(\d+)_x", (1, 3))
    assert found == {
        "encoder": {"norm": 9, "layer_0_x": {"kernel": 1, "n": 1}, "layer_1_x": {**layer, "n": 3}},
        "head": 3,
    }
    assert jc.rewrite.take_layers({"layers": {0: "a", 1: "b", 2: "c"}}, r"layers/(\d+)", (0, 2)) == {
        "layers": {0: "a", 1: "c"}
    }
    with pytest.raises(ValueError, match="no layer 4"):
        jc.rewrite.take_layers(tree, r"encoder/layer_(\d+)_x", (1, 4))
    with pytest.raises(ValueError, match="matches no layer"):
        jc.rewrite.take_layers(tree, r"block_(\d+)", (1,))


# Features by name


def test_features_of_a_linen_network_are_what_its_layers_give():
    x = normal(0, 2, 4, 4, 3)
    params = _random(Net().init(jax.random.key(0), x))

    def fn(p, x):
        return Net().apply(p, x)

    outputs, found = jax.jit(lambda p, x: jc.trace.features(fn, p, x, match=".*/[ac]/kernel"))(params, x)
    assert set(found) == {"params/a/kernel", "params/c/kernel"}
    np.testing.assert_allclose(outputs, fn(params, x), rtol=1e-5)
    _, kept = Net().apply(params, x, capture_intermediates=True)
    for name in ("a", "c"):
        want = kept["intermediates"][name]["__call__"][0] - params["params"][name]["bias"]
        np.testing.assert_allclose(found[f"params/{name}/kernel"], want, rtol=1e-4, atol=1e-5)


def test_features_of_nnx_and_plain_functions_have_gradients():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)

    def fn(state, x):
        return jnp.tanh(nnx.merge(graph, state)(x))

    x = normal(0, 2, 3)
    _, found = jc.trace.features(fn, state, x)
    np.testing.assert_allclose(found["kernel"], x @ model.kernel[...], rtol=1e-5)

    def twice(p, x):
        return jax.checkpoint(lambda x: jnp.tanh(x @ p["w"]))(x) @ p["w"]

    params = {"w": normal(1, 3, 3)}
    target = normal(2, 2, 3)

    def loss(p):
        return jc.distill.hints(jc.trace.features(twice, p, x)[1]["w"][0], target)

    want = jax.grad(lambda p: jc.distill.hints(x @ p["w"], target))(params)
    np.testing.assert_allclose(jax.grad(loss)(params)["w"], want["w"], rtol=1e-5)


def test_what_has_no_features_is_told():
    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    params, x = {"w": jnp.ones((2, 3, 3))}, jnp.ones((2, 3))
    with pytest.raises(ValueError, match="give the features back"):
        jc.trace.features(scanned, params, x)
    with pytest.raises(ValueError, match="matches none"):
        jc.trace.features(scanned, params, x, match="nothing")
