"""The order of units in which blocks are easiest to quantize: the function stays, the error of codebooks falls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc

BLOCK = 4


def network(rng, size=32):
    """A residual network: one group is written by two layers and read by two, inside each there is another."""

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def alike(n, m):
        """Rows in near copies, far from each other."""
        rows = np.repeat(rng.normal(size=(n // BLOCK, m)), BLOCK, axis=0) + 0.1 * rng.normal(size=(n, m))
        return jnp.asarray(rows[rng.permutation(n)], jnp.float32)

    params = {
        "in": {"kernel": drawn(6, size), "bias": drawn(size)},
        "up": {"kernel": alike(size, 48), "scale": drawn(size)},
        "down": {"kernel": alike(48, size)},
        "out": {"kernel": alike(size, 64)},
    }

    def fn(params, x):
        h = jax.nn.relu(x @ params["in"]["kernel"] + params["in"]["bias"])
        y = h / jnp.sqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-5) * params["up"]["scale"]
        return (h + jax.nn.gelu(y @ params["up"]["kernel"]) @ params["down"]["kernel"]) @ params["out"]["kernel"]

    return fn, params, drawn(5, 6)


def logdet(kernel):
    rows = np.asarray(kernel, np.float64).reshape(len(kernel) // BLOCK, BLOCK, -1).transpose(0, 2, 1).reshape(-1, BLOCK)
    return np.linalg.slogdet(np.cov(rows.T, bias=True))[1]


def bound(kernel):
    """The geometric mean of the variances of blocks, in mean squares of the kernel."""
    return np.exp(logdet(kernel) / BLOCK) / np.square(np.asarray(kernel, np.float64)).mean()


def error(params, kernels):
    plan = jc.plan(params, [(f"({'|'.join(kernels)})/kernel", jc.share.KMeans(16, block=(BLOCK, 1))), (".*", None)])
    dense = jc.materialize(jc.compress(params, plan))
    return {k: float(jnp.square(dense[k]["kernel"] - params[k]["kernel"]).sum()) for k in kernels}


def test_the_function_stays_and_every_layer_is_quantized_better(rng):
    fn, params, x = network(rng)
    groups = jc.trace.coupling(fn, params, x)
    new, orders = jc.rewrite.permute(params, groups, block=BLOCK)
    np.testing.assert_allclose(fn(new, x), fn(params, x), rtol=2e-4, atol=2e-4)
    assert sorted(len(order) for order in orders.values()) == [32, 48]
    assert all(sorted(order) == list(range(len(order))) for order in orders.values())
    kernels = ("down", "up", "out")
    before, after = error(params, kernels), error(new, kernels)
    assert logdet(new["down"]["kernel"]) < logdet(params["down"]["kernel"]) - 4
    assert after["down"] < 0.5 * before["down"]
    both = [bound(p["up"]["kernel"]) + bound(p["out"]["kernel"]) for p in (new, params)]
    assert both[0] < 0.95 * both[1]
    assert after["up"] + after["out"] < before["up"] + before["out"]


def test_latent_groups_of_near_copies_are_found(rng):
    rows = np.repeat(rng.normal(size=(16, 200)), BLOCK, axis=0) + 0.05 * rng.normal(size=(64, 200))
    kernel = jnp.asarray(rows[rng.permutation(64)], jnp.float32)
    params = {"a": {"kernel": jnp.asarray(rng.normal(size=(4, 64)), jnp.float32)}, "b": {"kernel": kernel}}
    groups = jc.trace.Groups.between(params, {"a/kernel": ["b/kernel"]})
    new, _ = jc.rewrite.permute(params, groups, block=BLOCK, key=jax.random.key(1))
    assert logdet(new["b"]["kernel"]) < logdet(kernel) - 6
    assert error(new, ("b",))["b"] < 0.4 * error(params, ("b",))["b"]
    np.testing.assert_allclose(
        new["a"]["kernel"] @ new["b"]["kernel"], params["a"]["kernel"] @ kernel, rtol=1e-3, atol=1e-3
    )


def test_without_exchanges_no_order_is_worse(rng):
    fn, params, x = network(rng)
    groups = jc.trace.coupling(fn, params, x)
    for swaps in (0, 300):
        new, _ = jc.rewrite.permute(params, groups, block=BLOCK, swaps=swaps)
        for names in (("down",), ("up", "out")):
            now, then = (sum(bound(p[n]["kernel"]) for n in names) for p in (new, params))
            assert now <= then + 1e-6


def test_orders_are_taken_where_words_have_less_error(rng):
    fn, params, x = network(rng)
    groups = jc.trace.coupling(fn, params, x)
    new, orders = jc.rewrite.permute(params, groups, block=BLOCK, words=16)
    kernels, before, after = ("down", "up", "out"), *(error(p, ("down", "up", "out")) for p in (params, new))
    assert orders and all(after[k] < before[k] for k in kernels[:1])
    plain = []
    for _ in range(8):  # nothing to be found
        params = {"up": {"kernel": jnp.ones((3, 16))}, "down": {"kernel": jnp.asarray(rng.normal(size=(16, 40)), "f4")}}
        groups = jc.trace.Groups.between(params, {"up/kernel": ["down/kernel"]})
        as_it_is = error(params, ("down",))["down"]
        plain.append(error(jc.rewrite.permute(params, groups, BLOCK)[0], ("down",))["down"] > as_it_is)
        assert error(jc.rewrite.permute(params, groups, BLOCK, words=16)[0], ("down",))["down"] <= as_it_is
    assert any(plain)


def test_a_kernel_that_words_do_not_tile_is_not_judged(rng):
    """It reads the units in part, and its other inputs leave no whole words."""

    def fn(p, x):
        return jnp.concatenate([x @ p["a"], x[:, :2]], axis=1) @ p["b"] + (x @ p["a"]) @ p["c"]

    params = {k: jnp.asarray(rng.normal(size=s), "f4") for k, s in {"a": (3, 16), "b": (18, 40), "c": (16, 40)}.items()}
    groups, x = jc.trace.coupling(fn, params, jnp.ones((1, 3))), jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    for words in (None, 16):
        new, _ = jc.rewrite.permute(params, groups, BLOCK, words=words)
        np.testing.assert_allclose(fn(new, x), fn(params, x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="words=1 must be at least 2"):
        jc.rewrite.permute(params, groups, BLOCK, words=1)


def test_heads_and_places_of_a_unit_move_together(rng):
    """Convolution and flattening: a channel stands for many rows of the next kernel."""
    params = {
        "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 8)), jnp.float32)},
        "mid": {"kernel": jnp.asarray(rng.normal(size=(1, 1, 8, 8)), jnp.float32)},
        "head": {"kernel": jnp.asarray(rng.normal(size=(4 * 4 * 8, 5)), jnp.float32)},
    }

    def fn(params, x):
        for name in ("conv", "mid"):
            x = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    x, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            )
        return x.reshape(len(x), -1) @ params["head"]["kernel"]

    x = jnp.asarray(rng.normal(size=(2, 4, 4, 2)), jnp.float32)
    groups = jc.trace.coupling(fn, params, x)
    new, orders = jc.rewrite.permute(params, groups, block=2)
    assert orders and any((order != np.arange(8)).any() for order in orders.values())
    np.testing.assert_allclose(fn(new, x), fn(params, x), rtol=1e-3, atol=1e-3)


def test_groups_of_a_norm_and_heads_stay_together(rng):
    """Channels move within the groups of a norm, and dimensions alike in all heads."""

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "a": {"kernel": drawn(4, 16), "scale": drawn(16)},
        **{name: {"kernel": drawn(16, 16)} for name in ("q", "k", "v", "o")},
        "b": {"kernel": drawn(16, 8)},
    }

    def fn(params, x):
        h = (x @ params["a"]["kernel"]).reshape(*x.shape[:-1], 4, 4)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-5)
        h = h.reshape(*x.shape[:-1], 16) * params["a"]["scale"]
        q, k, v = ((h @ params[name]["kernel"]).reshape(*h.shape[:-1], 4, 4) for name in "qkv")
        y = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k)), v)
        return jax.nn.relu(y.reshape(h.shape) @ params["o"]["kernel"]) @ params["b"]["kernel"]

    x = drawn(5, 4)
    new, orders = jc.rewrite.permute(params, jc.trace.coupling(fn, params, x), block=2)
    assert any((order != np.arange(len(order))).any() for order in orders.values())
    np.testing.assert_allclose(fn(new, x), fn(params, x), rtol=1e-3, atol=1e-3)


def test_units_that_a_constant_tells_apart_stay_where_they_are(rng):
    _, params, x = network(rng)
    gains = jnp.linspace(1.0, 3.0, 48)

    def told(params, x):
        """Of the group inside, units differ by their place; the residual group is free."""
        h = jax.nn.relu(x @ params["in"]["kernel"] + params["in"]["bias"])
        return (h + jax.nn.gelu(h @ params["up"]["kernel"] * gains) @ params["down"]["kernel"]) @ params["out"][
            "kernel"
        ]

    groups = jc.trace.coupling(told, params, x)
    new, orders = jc.rewrite.permute(params, groups, block=BLOCK, fn=lambda p: told(p, x))
    assert [len(order) for order in orders.values()] == [32]
    np.testing.assert_allclose(told(new, x), told(params, x), rtol=2e-3, atol=2e-3)


def test_a_block_of_one_input_has_no_order():
    with pytest.raises(ValueError, match="block=1 must be at least 2"):
        jc.rewrite.permute({}, {}, block=1)
