"""Two networks that share columns, and the order of units in which they are alike."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc
from jcompress.share.columns import _pairs

KEYS = jax.random.split(jax.random.key(0), 8)


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"])
    return hidden @ params["down"]["kernel"]


def network(key, sizes=(8, 12, 3)):
    keys = jax.random.split(key, 3)
    return {
        "up": {"kernel": jax.random.normal(keys[0], sizes[:2]), "bias": jax.random.normal(keys[1], sizes[1:2])},
        "down": {"kernel": jax.random.normal(keys[2], sizes[1:])},
    }


def shuffled(params, order):
    up, down = params["up"], params["down"]
    return {
        "up": {"kernel": up["kernel"][:, order], "bias": up["bias"][order]},
        "down": {"kernel": down["kernel"][order]},
    }


def near(params, scale, key):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    moved = [x + scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, moved)


def test_an_order_is_found_again_and_the_function_stays():
    like = network(KEYS[0])
    order = jax.random.permutation(KEYS[1], 12)
    params = near(shuffled(like, order), 0.05, KEYS[2])
    groups = jc.trace.coupling(mlp, params, jnp.ones((1, 8)))
    new, orders = jc.rewrite.match_units(params, like, groups)
    np.testing.assert_array_equal(np.asarray(order)[orders["up/kernel[1]"]], np.arange(12))
    x = jax.random.normal(KEYS[3], (5, 8))
    np.testing.assert_allclose(mlp(new, x), mlp(params, x), rtol=1e-5, atol=1e-5)
    assert jc.rewrite.match_units(new, like, groups)[1]["up/kernel[1]"].tolist() == list(range(12))


def test_orders_of_layers_that_meet_are_found_in_turns():
    def deep(params, x):
        for name in ("a", "b"):
            x = jax.nn.relu(x @ params[name])
        return x @ params["c"]

    sizes = {"a": (4, 6), "b": (6, 7), "c": (7, 3)}
    like = {n: jax.random.normal(k, s) for k, (n, s) in zip(KEYS, sizes.items(), strict=False)}
    first, second = jax.random.permutation(KEYS[4], 6), jax.random.permutation(KEYS[5], 7)
    params = {"a": like["a"][:, first], "b": like["b"][first][:, second], "c": like["c"][second]}
    groups = jc.trace.coupling(deep, params, jnp.ones((1, 4)))
    new, _ = jc.rewrite.match_units(params, like, groups)
    jax.tree.map(np.testing.assert_array_equal, new, like)


def test_networks_of_other_shapes_are_not_aligned():
    params, like = network(KEYS[0]), network(KEYS[1], sizes=(8, 10, 3))
    groups = jc.trace.coupling(mlp, params, jnp.ones((1, 8)))
    with pytest.raises(ValueError, match=r"up/bias: found shape \(12,\), and \(10,\) in like"):
        jc.rewrite.match_units(params, like, groups)


def calibrated(tree):
    """Statistics of both networks, each on inputs of its own."""
    batches = [
        (jax.random.normal(k, (200, 8)) @ jnp.triu(jnp.ones((8, 8))), jax.random.normal(k, (200, 8))) for k in KEYS
    ]
    return batches, jc.calibrate(
        lambda p, x, y: (mlp(p["a"], x), mlp(p["b"], y)), tree, batches,
        jc.plan(tree, [(".*kernel", jc.quantize.GPTQ(bits=4)), (".*", None)]),
    )  # fmt: skip


def test_joined_columns_are_the_optimum_of_both_layers():
    keys = jax.random.split(KEYS[6], 4)
    a, b = (np.asarray(jax.random.normal(k, (5, 4)), np.float64) for k in keys[:2])
    x, y = (np.asarray(jax.random.normal(k, (40, 5)), np.float64) for k in keys[2:])
    mine, theirs, joint = _pairs(a, b, x.T @ x, y.T @ y, count=4)
    # The least squares of both layers together, one pair after another.
    rows = np.concatenate([x, y])
    total = 0.0
    for i, j, word in zip(mine, theirs, joint.T, strict=True):
        wanted = np.concatenate([x @ a[:, i], y @ b[:, j]])
        best, cost = np.linalg.lstsq(rows, wanted, rcond=None)[:2]
        np.testing.assert_allclose(word, best, rtol=1e-6)
        total += float(cost[0])

    def cost(i, j):
        return np.linalg.lstsq(rows, np.concatenate([x @ a[:, i], y @ b[:, j]]), rcond=None)[1][0]

    every = [sum(cost(i, j) for i, j in enumerate(order)) for order in itertools.permutations(range(4))]
    np.testing.assert_allclose(total, min(every), rtol=1e-6)


def test_two_networks_share_and_train_and_are_stored_as_one(tmp_path):
    first = network(KEYS[0])
    params = {"a": first, "b": near(shuffled(first, jnp.arange(12)[::-1]), 0.1, KEYS[1])}
    groups = jc.trace.coupling(mlp, first, jnp.ones((1, 8)))
    params["b"] = jc.rewrite.match_units(params["b"], params["a"], groups)[0]
    batches, stats = calibrated(params)
    tree = jc.share.zipped(params, {r"b/(.*kernel)": r"a/\1"}, share=0.75, stats=stats)
    dense = jc.materialize(tree)
    x, y = batches[0]
    for name, own in (("a", x), ("b", y)):
        wanted, found = mlp(params[name], own), mlp(dense[name], own)
        assert float(jnp.square(found - wanted).sum() / jnp.square(wanted).sum()) < 0.03
    # Three of four columns stand once.
    assert tree["a"]["up"]["kernel"].codebook.shape == (12 + 3, 8)
    whole = jc.nbits(params) - jc.nbits(tree)
    saved = 32 * (9 * 8 + 2 * 12)
    assert saved - 200 < whole < saved
    jc.save(tmp_path / "both.jc", tree)
    jax.tree.map(np.testing.assert_array_equal, jc.materialize(jc.load(tmp_path / "both.jc")), dense)

    train, held = jc.split(tree)
    assert len(jax.tree.leaves(train)) == 4  # two codebooks, two biases

    def loss(train, x, y):
        both = jc.materialize(jc.merge(train, held))
        return (
            jnp.square(mlp(both["a"], x) - mlp(params["a"], x)).mean()
            + jnp.square(mlp(both["b"], y) - mlp(params["b"], y)).mean()
        )

    # The gradient of a column is the sum of both uses.
    grads = jax.grad(loss)(train, x, y)
    dense_grads = jax.grad(
        lambda d: (
            jnp.square(mlp(d["a"], x) - mlp(params["a"], x)).mean()
            + jnp.square(mlp(d["b"], y) - mlp(params["b"], y)).mean()
        )
    )(dense)
    node = tree["b"]["up"]["kernel"]
    word = int(tree["a"]["up"]["kernel"].indices[0, 0])
    place = [int(i) for i in np.flatnonzero(np.asarray(node.indices)[0] == word)]
    wanted = dense_grads["a"]["up"]["kernel"][:, 0] + sum(dense_grads["b"]["up"]["kernel"][:, i] for i in place)
    np.testing.assert_allclose(grads["a"]["up"]["kernel"].codebook[word], wanted, rtol=1e-4, atol=1e-5)

    tx = optax.adam(1e-2)
    state, before = tx.init(train), float(loss(train, x, y))

    @jax.jit
    def step(train, state):
        updates, state = tx.update(jax.grad(loss)(train, x, y), state)
        return optax.apply_updates(train, updates), state

    for _ in range(30):
        train, state = step(train, state)
    assert float(loss(train, x, y)) < before


@pytest.mark.parametrize("out_first", [False, True])
def test_convolutions_in_either_layout(out_first):
    spec = ("NHWC", "OIHW" if out_first else "HWIO", "NHWC")
    shape = (6, 4, 3, 3) if out_first else (3, 3, 4, 6)

    def fn(p, x):
        return [jax.lax.conv_general_dilated(x, p[n], (1, 1), "SAME", dimension_numbers=spec) for n in ("a", "b")]

    params = {"a": jax.random.normal(KEYS[0], shape), "b": jax.random.normal(KEYS[1], shape)}
    x = jax.random.normal(KEYS[2], (4, 5, 5, 4))
    plan = jc.plan(params, [(".*", jc.quantize.GPTQ(bits=4))], layout=jc.trace.layout(fn, params, x))
    stats = jc.calibrate(fn, params, [x], plan)
    tree = jc.share.zipped(params, {"b": "a"}, share=0.5, stats=stats)
    made = jc.materialize(tree)
    outputs = 0 if out_first else -1
    columns = [np.moveaxis(np.asarray(made[n]), outputs, 0).reshape(6, -1) for n in ("a", "b")]
    alike = (np.abs(columns[0][:, None] - columns[1][None]).max(-1) == 0).sum()
    assert alike == 3
    kept = [(np.abs(np.asarray(made[n]) - np.asarray(params[n])).reshape(-1).max() > 0) for n in ("a", "b")]
    assert kept == [True, True]
    nothing = jc.share.zipped(params, {"b": "a"}, share=0.0, stats=stats)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), jc.materialize(nothing), params)


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ({"b/up/kernel": "a/up/kernel"}, {"share": 1.5}, "zipped: share=1.5 must be from 0 to 1"),
        ({"b/up/kernel": "a/uq/kernel"}, {}, "b/up/kernel: its owner 'a/uq/kernel' is not in the tree"),
        ({"b/on/kernel": "a/up/kernel"}, {}, "zip: leaf 'b/on/kernel' matches no leaf"),
        ({"b/up/kernel": "a/down/kernel"}, {}, r"b/up/kernel: found float32\[8, 12\], and a/down/kernel is float32"),
        ({"b/up/bias": "a/up/bias"}, {}, "expected the kernel of a dense layer or a convolution"),
        ({"b/up/kernel": "a/up/kernel"}, {"stats": {}}, "a/up/kernel: needs 'gram'"),
        ({"b/up/kernel": "a/up/kernel", "a/down/kernel": "a/up/kernel"}, {}, "a/up/kernel: is in two pairs"),
    ],
)  # fmt: skip
def test_bad_input_names_the_path_and_the_fix(pairs, options, message):
    params = {"a": network(KEYS[0]), "b": network(KEYS[1])}
    if len(pairs) == 2:
        params["a"]["down"]["kernel"] = params["a"]["up"]["kernel"]
    with pytest.raises(ValueError, match=message):
        jc.share.zipped(params, pairs, **options)


def test_what_is_not_finite_is_refused_by_name():
    params = {"a": network(KEYS[0]), "b": network(KEYS[1])}
    groups = jc.trace.coupling(mlp, params["a"], jnp.ones((1, 8)))
    params["b"]["up"]["kernel"] = params["b"]["up"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="b/up/kernel: found NaN or infinity"):
        jc.share.zipped(params, {"b/up/kernel": "a/up/kernel"})
    with pytest.raises(ValueError, match="up/kernel: found NaN or infinity"):
        jc.rewrite.match_units(params["b"], params["a"], groups)
    with pytest.raises(ValueError, match="a/up/kernel: zipped reads the values"):
        jax.jit(lambda p: jc.share.zipped(p, {"b/up/kernel": "a/up/kernel"}))(params)


def test_narrow_kernels_stay_narrow():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {"a": network(KEYS[0]), "b": network(KEYS[1])})
    tree = jc.share.zipped(params, {r"b/(.*kernel)": r"a/\1"}, share=0.5)
    dense = jc.materialize(tree)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(dense))
    a, b = (np.asarray(dense[n]["up"]["kernel"], np.float32) for n in ("a", "b"))
    assert (np.abs(a[:, :, None] - b[:, None]).max(0) == 0).sum() == 6
