"""Padding does not count: statistics of a padded batch with a mask are those of its rows without the padding."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jcompress as jc

LENGTHS, T, D = (4, 7, 1), 7, 6
MASK = jnp.arange(T) < jnp.array(LENGTHS)[:, None]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def weights(**shapes):
    return {name: normal(i, *shape) * 0.5 for i, (name, shape) in enumerate(shapes.items())}


def mlp(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def flattened(p, x):
    return jnp.tanh(x.reshape(-1, D) @ p["a"]).reshape(*x.shape[:2], 4) @ p["b"]


def time_first(p, x):
    return jnp.tanh(x.swapaxes(0, 1) @ p["a"]) @ p["b"]


def normed(p, x):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return jax.nn.softmax(x @ p["a"]) @ p["b"]


def attention(p, x):
    q, k, v = (jnp.einsum("btd,dhk->bhtk", x, p[n]) for n in "qkv")
    seen = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    scores = jnp.where(seen, jnp.einsum("bhtk,bhsk->bhts", q, k), -1e30)
    mixed = jnp.einsum("bhts,bhsk->bthk", jax.nn.softmax(scores), v)
    return x + jnp.einsum("bthk,hkd->btd", mixed, p["o"])


def causal(p, x):
    numbers = ("NWC", "WIO", "NWC")
    y = lax.conv_general_dilated(x, p["a"], (1,), ((2, 0),), dimension_numbers=numbers)
    return jnp.tanh(y) @ p["b"]


def recurrent(p, x):
    def turn(h, x):
        h = jnp.tanh(x @ p["a"] + h @ p["b"])
        return h, h @ p["c"]

    return lax.scan(turn, jnp.zeros((x.shape[0], 4)), x.swapaxes(0, 1))[1].swapaxes(0, 1) @ p["d"]


def backwards(p, x):
    def turn(h, x):
        return jnp.tanh(x @ p["a"]), None

    return lax.scan(turn, jnp.zeros((x.shape[0], 4)), x.swapaxes(0, 1)[::-1], reverse=True)[0]


def layers(p, x):
    body = jax.checkpoint(lambda h, w: (h + jnp.tanh(h @ w), None))
    return lax.scan(body, x, p["stack"])[0] @ p["out"]


def experts(p, x):
    gates = jax.nn.softmax(x @ p["router"])
    return jnp.einsum("bte,betf->btf", gates, jnp.einsum("btd,edf->betf", x, p["up"]))


def gates(p, x):
    a, b = jnp.split(x @ p["a"], 2, -1)
    return (a * jax.nn.sigmoid(b)) @ p["b"]


def vmapped(p, x):
    return jax.vmap(jax.vmap(lambda x: jnp.tanh(p["a"] @ x) @ p["b"]))(x)


def routed(p, x):
    rows = x.reshape(-1, D)
    expert = jnp.argmax(rows @ p["router"], -1)
    order, sizes = jnp.argsort(expert), jnp.bincount(expert, length=3)
    h = jnp.tanh(lax.ragged_dot(rows[order], p["up"], sizes))
    y = lax.ragged_dot(h, p["down"], sizes)[jnp.argsort(order)]
    return x + (y @ p["out"]).reshape(x.shape)


def routed_in_a_loop(p, x):
    def turn(x, layer):
        order = jnp.argsort(x.reshape(-1, D)[:, 0])
        y = jnp.tanh(jnp.take(x.reshape(-1, D), order, axis=0) @ layer["a"])[jnp.argsort(order)]
        return x + y.reshape(x.shape) @ layer["b"], None

    return lax.scan(turn, x, p)[0]


def chosen_tokens(p, x):
    place = jnp.argsort(-jnp.arange(x.shape[1]))[None, :, None]
    return jnp.take_along_axis(x, jnp.broadcast_to(place, (x.shape[0], x.shape[1], 1)), axis=1) @ p["a"]


def branches(p, x):
    return lax.cond(p["a"].sum() > 0, jnp.tanh, jnp.sin, x @ p["a"]) @ p["b"]


MODELS = {
    mlp: weights(a=(D, 4), b=(4, 3)),
    flattened: weights(a=(D, 4), b=(4, 3)),
    time_first: weights(a=(D, 4), b=(4, 3)),
    normed: weights(a=(D, 4), b=(4, 3)),
    attention: weights(q=(D, 2, 3), k=(D, 2, 3), v=(D, 2, 3), o=(2, 3, D)),
    causal: weights(a=(3, D, 4), b=(4, 3)),
    recurrent: weights(a=(D, 4), b=(4, 4), c=(4, 3), d=(3, 2)),
    backwards: weights(a=(D, 4)),
    layers: weights(stack=(3, D, D), out=(D, 2)),
    experts: weights(router=(D, 3), up=(3, D, 4)),
    gates: weights(a=(D, 8), b=(4, 3)),
    vmapped: weights(a=(4, D), b=(4, 3)),
    routed: weights(router=(D, 3), up=(3, D, 4), down=(3, 4, D), out=(D, D)),
    routed_in_a_loop: weights(a=(2, D, D), b=(2, D, D)),
    chosen_tokens: weights(a=(D, 4)),
    branches: weights(a=(D, 4), b=(4, 3)),
}
NAMES = ("gram", "count", "sum", "absmax", "norm", "zeros", "histogram", "outputs")


def padded(garbage):
    return jnp.where(MASK[..., None], normal(7, len(LENGTHS), T, D), garbage)


def alone(model, x):
    """The statistics of each row without its padding, together."""
    observe = functools.partial(jc.trace.observe, model, MODELS[model], statistics=NAMES)
    first, *rest = (observe(x[i : i + 1, :n])[1] for i, n in enumerate(LENGTHS))
    return functools.reduce(lambda a, b: a.merge(b), rest, first)


@pytest.mark.parametrize("model", MODELS, ids=lambda f: f.__name__)
def test_a_padded_batch_is_its_rows_without_padding(model):
    x = padded(3.0)
    found = jax.jit(functools.partial(jc.trace.observe, model, statistics=NAMES))(MODELS[model], x, where=MASK)[1]
    want = alone(model, x)
    assert not found.unread and set(found) == set(want) == set(MODELS[model])
    for path in want:
        for a, b in zip(jax.tree.leaves(found[path]), jax.tree.leaves(want[path]), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=f"{path}: {a} {b}")


def test_what_is_not_finite_in_the_padding_does_not_count():
    x = padded(jnp.nan)
    stats = jc.calibrate(mlp, MODELS[mlp], [x], where=MASK)
    np.testing.assert_allclose(stats["b"].gram, alone(mlp, padded(0.0))["b"].gram, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
def test_weights_of_positions(dtype):
    """A position of weight 2 is one that is there twice; those of 0 are not there."""
    x, weight = normal(0, 2, 3, D), jnp.array([[2, 1, 0], [0, 3, 1]], dtype)
    found = jc.trace.observe(mlp, MODELS[mlp], x, statistics=NAMES, where=weight)[1]
    repeated = jnp.repeat(x.reshape(-1, D), np.asarray(weight).reshape(-1).astype(int), axis=0)
    want = jc.trace.observe(mlp, MODELS[mlp], repeated, statistics=NAMES)[1]
    for path in ("a", "b"):
        assert found[path].count.dtype == (jnp.float32 if dtype == jnp.float32 else jnp.uint32)
        for a, b in zip(jax.tree.leaves(found[path]), jax.tree.leaves(want[path]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def embedded(p, tokens):
    return p["table"][tokens] @ p["w"]


@pytest.mark.parametrize("how", ["array", "list", "generator", "function"])
def test_masks_of_batches(how):
    p = weights(table=(9, 4), w=(4, 3))
    batches = [jnp.array([[1, 2, 0], [3, 0, 0]]), jnp.array([[4, 4, 4], [5, 0, 0]])]
    masks = [tokens != 0 for tokens in batches]
    where = {"list": masks, "generator": iter(masks), "function": lambda tokens: tokens != 0, "array": masks[0]}[how]
    stats = jc.calibrate(embedded, p, batches, where=where)
    rows = np.asarray(
        jnp.concatenate([t[masks[0] if how == "array" else m] for t, m in zip(batches, masks, strict=True)])
    )
    assert stats["table"].counts.tolist() == np.bincount(rows, minlength=9).tolist()
    x = np.asarray(p["table"], np.float64)[rows]
    np.testing.assert_allclose(stats["w"].gram, x.T @ x, rtol=1e-5, atol=1e-5)


def test_images_that_pad_a_batch():
    model = nn.Sequential([nn.Conv(4, (3, 3), strides=2), nn.relu, lambda x: x.reshape(x.shape[0], -1), nn.Dense(3)])
    x, keep = normal(0, 4, 6, 6, 2), jnp.array([True, True, True, False])
    p = model.init(jax.random.key(0), x)
    found = jc.calibrate(model.apply, p, [x], where=keep)
    want = jc.calibrate(model.apply, p, [x[:3]])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, want)


def pooled(p, x):
    h = jnp.tanh(x @ p["a"])
    return h.mean(1) @ p["mean"] + h[:, 0] @ p["first"]


def test_a_sum_over_positions_counts_if_one_of_them_does():
    p, x = weights(a=(D, 4), mean=(4, 3), first=(4, 3)), normal(0, 3, 5, D)
    mask = jnp.arange(5) < jnp.array([[3], [5], [0]])
    stats = jc.trace.observe(pooled, p, x, where=mask)[1]
    assert [int(stats[n].count) for n in ("a", "mean", "first")] == [8, 2, 2]
    rows = np.asarray(jnp.tanh(x @ p["a"]).mean(1), np.float64)[:2]
    np.testing.assert_allclose(stats["mean"].gram, rows.T @ rows, rtol=1e-5)
    weighed = jc.trace.observe(pooled, p, x, where=mask * 0.5)[1]
    assert list(weighed) == ["a", "first"] and "sums over axis 1 of where" in weighed.unread["mean"]


def prefixed(p, x):
    h = jnp.concatenate([jnp.zeros((x.shape[0], 1, D)), x], 1)
    return h @ p["a"]


def written(p, x):
    order = jnp.argsort(x[..., 0], axis=1)
    return jnp.zeros_like(x).at[jnp.arange(2)[:, None], order].set(x) @ p["a"]


def strided(p, x):
    return lax.conv_general_dilated(x, p["k"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


@pytest.mark.parametrize(
    ("model", "path", "shape"),
    [(prefixed, "a", (D, 4)), (written, "a", (D, 4)), (strided, "k", (2, D, 4))],
)
def test_positions_that_cannot_be_followed_are_named(model, path, shape):
    p, x = {path: normal(0, *shape)}, normal(1, 2, 6, D)
    plan = jc.plan(p, [(path, jc.quantize.GPTQ(bits=4))])
    with pytest.raises(
        ValueError, match=rf"^{path}: .*gram.*positions along axis . cannot be matched with axis . of where"
    ):
        jc.calibrate(model, p, [x], plan, where=jnp.ones((2, 6), bool))
    if model is not written:  # by example they can
        jc.calibrate(model, p, [x], plan, where=jnp.ones(2, bool))


def shifted(p, x):
    return jnp.zeros((x.shape[0], 9, D)).at[:, 2 : 2 + x.shape[1]].set(x) @ p["a"]


def cached(p, x):
    return lax.dynamic_update_slice(jnp.ones((x.shape[0], 9, D)), x, (0, 1, 0)) @ p["a"]


def summed(p, x):
    return jnp.zeros((x.shape[0], 2, D)).at[:, jnp.array([0, 1, 1, 0, 1, 0])].add(x) @ p["a"]


def by_row(p, x):
    order = jnp.argsort(x[..., 0], axis=1)
    return jax.vmap(lambda x, order: jnp.zeros_like(x).at[order].set(x))(x, order) @ p["a"]


@pytest.mark.parametrize("model", [shifted, cached, summed, by_row])
def test_examples_are_followed_where_their_positions_are_written_elsewhere(model):
    p, x = {"a": normal(0, D, 4)}, normal(1, 3, 6, D)
    found = jc.trace.observe(model, p, x, statistics=NAMES, where=jnp.array([True, False, True]))[1]
    want = jc.trace.observe(model, p, x[::2], statistics=NAMES)[1]
    for a, b in zip(jax.tree.leaves(found["a"]), jax.tree.leaves(want["a"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    unread = jc.trace.observe(model, p, x, where=jnp.ones((3, 6), bool))[1].unread
    assert "positions along axis 1 cannot be matched with axis 1 of where" in unread["a"]


def test_positions_inside_a_mesh_are_named():
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, rows = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("rows")

    def spread(p, x):
        return jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(whole, rows), out_specs=rows)(p["a"], x)

    p, x = {"a": normal(0, D, 4)}, normal(1, 8, 3, D)
    plan = jc.plan(p, [("a", jc.quantize.GPTQ(bits=4))])
    with pytest.raises(ValueError, match=r"^a: .*gram.*positions along axis . cannot be matched with axis . of where"):
        jc.calibrate(spread, p, [x], plan, where=jnp.arange(8) < 5)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"where: found shape \(3, 2\), expected that of the leading axes"):
        jc.calibrate(mlp, MODELS[mlp], [normal(0, 2, 3, D)], where=jnp.ones((3, 2), bool))
    with pytest.raises(ValueError, match="where: found another number of masks"):
        jc.calibrate(mlp, MODELS[mlp], [normal(0, 2, 3, D)] * 2, where=[jnp.ones((2, 3), bool)])
