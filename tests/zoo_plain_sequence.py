"""Sequence models of the zoo in plain jax: attention, layers under scan, LSTM, mixer."""

import jax
import jax.numpy as jnp
from jax import lax
from zoo_entry import Built, Entry, conv_count, dense_count, features, images, randomize, tokens
from zoo_plain import conv, conv_params, dense, dense_params

CLASSES = 3


def layer_norm_params(width):
    return {"scale": jnp.zeros(width), "bias": jnp.zeros(width)}


def matrix(*shape):
    return {"kernel": jnp.zeros(shape)}


def layer_norm(p, x):
    """In two passes, so that cut channels are not zero in between."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    centered = x - mean
    var = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    return centered / jnp.sqrt(var + 1e-6) * p["scale"] + p["bias"]


def rms_norm(p, x):
    return x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * p["scale"]


def attend(q, k, v, mask=None):
    """Softmax attention over (batch, length, heads, dim)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)


def encoder():
    """Post-norm blocks; one kernel for queries, keys and values, reshaped to (3, heads, head_dim)."""

    def block(p, x, heads):
        batch, length, _ = x.shape
        qkv = dense(p["qkv"], x).reshape(batch, length, 3, heads, -1)
        y = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(batch, length, -1)
        x = layer_norm(p["norm_0"], x + dense(p["out"], y))
        y = dense(p["down"], jax.nn.gelu(dense(p["up"], x)))
        return layer_norm(p["norm_1"], x + y)

    def fn(p, x):
        x = dense(p["embed"], x) + p["positions"]
        x = block(p["block_0"], x, 4)
        x = block(p["block_1"], x, 3)
        return dense(p["head"], x.mean(axis=1))

    def block_params(width, heads, head_dim, hidden):
        return {
            "qkv": dense_params(width, 3 * heads * head_dim),
            "out": dense_params(heads * head_dim, width),
            "up": dense_params(width, hidden),
            "down": dense_params(hidden, width),
            "norm_0": layer_norm_params(width),
            "norm_1": layer_norm_params(width),
        }

    def block_count(width, heads, head_dim, hidden):
        qkv, out = dense_count(width, 3 * heads * head_dim), dense_count(heads * head_dim, width)
        return qkv + out + dense_count(width, hidden) + dense_count(hidden, width) + 4 * width

    params = {
        "embed": dense_params(5, 10),
        "positions": jnp.zeros((7, 10)),
        "block_0": block_params(10, 4, 6, 14),
        "block_1": block_params(10, 3, 8, 16),
        "head": dense_params(10, CLASSES),
    }
    widths, sizes = {"width": ("positions", 1)}, {"width": 10}
    for i, (heads, head_dim, hidden) in enumerate([(4, 6, 14), (3, 8, 16)]):
        widths[f"heads_{i}"] = widths[f"head_dim_{i}"] = (f"block_{i}/qkv/kernel", 1)
        widths[f"hidden_{i}"] = (f"block_{i}/up/kernel", 1)
        sizes |= {f"heads_{i}": heads, f"head_dim_{i}": head_dim, f"hidden_{i}": hidden}
    return Built(
        fn=fn,
        params=randomize(params, jax.random.key(60)),
        args=features(7, 5),
        widths=widths,
        sizes=sizes,
        count=lambda width, heads_0, head_dim_0, hidden_0, heads_1, head_dim_1, hidden_1: (
            dense_count(5, width)
            + 7 * width
            + block_count(width, heads_0, head_dim_0, hidden_0)
            + block_count(width, heads_1, head_dim_1, hidden_1)
            + dense_count(width, CLASSES)
        ),
    )


def rotate(x):
    """Rotary position embedding: the first half of each head pairs with the second."""
    length, half = x.shape[1], x.shape[-1] // 2
    frequencies = 1.0 / (100.0 ** (jnp.arange(half) / half))
    angles = jnp.arange(length)[:, None] * frequencies
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def decoder():
    """Causal, grouped-query attention with rotary positions, gated MLP, and one embedding for input and output."""
    widths, sizes, params = {"width": ("embedding", 1)}, {"width": 14}, {"embedding": jnp.zeros((11, 14))}
    config = [(3, 2, 5, 8, 18), (2, 4, 3, 7, 20)]
    for i, (kv_heads, queries, half, v, hidden) in enumerate(config):
        params[f"block_{i}"] = {
            "query": matrix(14, kv_heads * queries * 2 * half),
            "key": matrix(14, kv_heads * 2 * half),
            "value": matrix(14, kv_heads * v),
            "out": matrix(kv_heads * queries * v, 14),
            "gate": matrix(14, hidden),
            "up": matrix(14, hidden),
            "down": matrix(hidden, 14),
            "norm_0": layer_norm_params(14),
            "norm_1": layer_norm_params(14),
        }
        widths |= {
            f"kv_heads_{i}": (f"block_{i}/value/kernel", 1),
            f"queries_{i}": (f"block_{i}/out/kernel", 0),
            f"rotary_{i}": (f"block_{i}/query/kernel", 1),
            f"v_{i}": (f"block_{i}/value/kernel", 1),
            f"hidden_{i}": (f"block_{i}/gate/kernel", 1),
        }
        sizes |= {f"kv_heads_{i}": kv_heads, f"queries_{i}": queries, f"rotary_{i}": half}
        sizes |= {f"v_{i}": v, f"hidden_{i}": hidden}
    params["norm"] = layer_norm_params(14)

    def attention(p, x, kv_heads, queries):
        batch, length, _ = x.shape
        q = (x @ p["query"]["kernel"]).reshape(batch, length, kv_heads * queries, -1)
        k = (x @ p["key"]["kernel"]).reshape(batch, length, kv_heads, -1)
        v = (x @ p["value"]["kernel"]).reshape(batch, length, kv_heads, -1)
        k, v = jnp.repeat(rotate(k), queries, axis=2), jnp.repeat(v, queries, axis=2)
        mask = jnp.tril(jnp.ones((length, length), bool))
        return attend(rotate(q), k, v, mask).reshape(batch, length, -1) @ p["out"]["kernel"]

    def fn(p, tokens):
        x = p["embedding"][tokens]
        for i, (kv_heads, queries, *_) in enumerate(config):
            block = p[f"block_{i}"]
            x = x + attention(block, layer_norm(block["norm_0"], x), kv_heads, queries)
            y = layer_norm(block["norm_1"], x)
            y = jax.nn.silu(y @ block["gate"]["kernel"]) * (y @ block["up"]["kernel"])
            x = x + y @ block["down"]["kernel"]
        return layer_norm(p["norm"], x) @ p["embedding"].T

    def count(width, **sizes):
        total = (11 + 2) * width
        for i in range(2):
            names = ("kv_heads", "queries", "rotary", "v", "hidden")
            kv, queries, half, v, hidden = (sizes[f"{name}_{i}"] for name in names)
            total += 4 * width + width * kv * (queries + 1) * (2 * half + v) + 3 * width * hidden
        return total

    return Built(
        fn=fn,
        params=randomize(params, jax.random.key(61)),
        args=tokens(6, 11),
        widths=widths,
        sizes=sizes,
        count=count,
    )


def scanned():
    """Layers under ``lax.scan`` with ``jax.checkpoint``; the head reads a learned mean of all of their states."""

    @jax.checkpoint
    def layer(x, p):
        batch, length, _ = x.shape
        q, k, v = jnp.split(rms_norm(p["norm_0"], x) @ p["qkv"]["kernel"], 3, axis=-1)
        q, k, v = (y.reshape(batch, length, 3, -1) for y in (q, k, v))
        x = x + attend(q, k, v).reshape(batch, length, -1) @ p["out"]["kernel"]
        x = x + dense(p["down"], jax.nn.relu(dense(p["up"], rms_norm(p["norm_1"], x))))
        return x, x.mean(axis=1)

    def fn(p, x):
        x, states = lax.scan(layer, dense(p["embed"], x), p["layers"])
        pooled = jnp.einsum("l,lbc->bc", jax.nn.softmax(p["mix"]), states)
        return dense(p["head"], pooled + x[:, -1])

    layer_params = {
        "qkv": matrix(10, 3 * 3 * 4),
        "out": matrix(3 * 4, 10),
        "up": dense_params(10, 14),
        "down": dense_params(14, 10),
        "norm_0": {"scale": jnp.zeros(10)},
        "norm_1": {"scale": jnp.zeros(10)},
    }
    params = {
        "embed": dense_params(5, 10),
        "layers": jax.tree.map(lambda x: jnp.zeros((2, *x.shape)), layer_params),
        "mix": jnp.zeros(2),
        "head": dense_params(10, CLASSES),
    }
    return Built(
        fn=fn,
        params=randomize(params, jax.random.key(62)),
        args=features(6, 5),
        widths={
            "width": ("layers/norm_0/scale", 1),
            "heads": ("layers/out/kernel", 1),
            "qk": ("layers/qkv/kernel", 2),
            "v": ("layers/out/kernel", 1),
            "hidden": ("layers/up/kernel", 2),
        },
        sizes={"width": 10, "heads": 3, "qk": 4, "v": 4, "hidden": 14},
        count=lambda width, heads, qk, v, hidden: (
            dense_count(5, width)
            + 2
            * (2 * width + width * heads * (2 * qk + 2 * v) + dense_count(width, hidden) + dense_count(hidden, width))
            + 2
            + dense_count(width, CLASSES)
        ),
    )


def lstm():
    """One kernel for the four gates, split after the product; cells of two layers in one scan."""

    def cell(p, x, state):
        hidden, memory = state
        gates = x @ p["input"]["kernel"] + hidden @ p["recurrent"]["kernel"] + p["bias"]
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        memory = jax.nn.sigmoid(f + 1.0) * memory + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(memory), memory

    def fn(p, x):
        def step(states, now):
            first = cell(p["cell_0"], now, states[0])
            second = cell(p["cell_1"], first[0], states[1])
            return (first, second), second[0]

        start = tuple((jnp.zeros((x.shape[0], h)),) * 2 for h in (9, 7))
        _, outputs = lax.scan(step, start, jnp.swapaxes(x, 0, 1))
        return dense(p["head"], outputs).swapaxes(0, 1)

    def cell_params(inputs, hidden):
        return {
            "input": matrix(inputs, 4 * hidden),
            "recurrent": matrix(hidden, 4 * hidden),
            "bias": jnp.zeros(4 * hidden),
        }

    params = {"cell_0": cell_params(5, 9), "cell_1": cell_params(9, 7), "head": dense_params(7, CLASSES)}
    return Built(
        fn=fn,
        params=randomize(params, jax.random.key(63)),
        args=features(6, 5),
        widths={"hidden_0": ("cell_0/recurrent/kernel", 0), "hidden_1": ("cell_1/bias", 0)},
        sizes={"hidden_0": 9, "hidden_1": 7},
        count=lambda hidden_0, hidden_1: (
            4 * hidden_0 * (5 + hidden_0 + 1)
            + 4 * hidden_1 * (hidden_0 + hidden_1 + 1)
            + dense_count(hidden_1, CLASSES)
        ),
    )


def mixer():
    """Patches by reshape and transpose; the token mixing has no biases, so that cut channels stay zero."""

    def block(p, x):
        y = jnp.einsum("btc,th->bhc", layer_norm(p["norm_0"], x), p["token_up"]["kernel"])
        x = x + jnp.einsum("bhc,ht->btc", jax.nn.gelu(y), p["token_down"]["kernel"])
        y = jax.nn.gelu(dense(p["channel_up"], layer_norm(p["norm_1"], x)))
        return x + dense(p["channel_down"], y)

    def fn(p, x):
        x = jax.nn.relu(conv(p["stem"], x))
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 4, 4, width // 4, 4, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 4, -1)
        x = block(p["block_1"], block(p["block_0"], dense(p["patches"], x)))
        return dense(p["head"], x.mean(axis=1))

    def block_params(channels, token_hidden, channel_hidden):
        return {
            "norm_0": layer_norm_params(channels),
            "token_up": matrix(4, token_hidden),
            "token_down": matrix(token_hidden, 4),
            "norm_1": layer_norm_params(channels),
            "channel_up": dense_params(channels, channel_hidden),
            "channel_down": dense_params(channel_hidden, channels),
        }

    params = {
        "stem": conv_params(3, 2, 6),
        "patches": dense_params(16 * 6, 10),
        "block_0": block_params(10, 7, 12),
        "block_1": block_params(10, 9, 14),
        "head": dense_params(10, CLASSES),
    }
    widths, sizes = {"stem": ("stem/kernel", 3), "channels": ("patches/kernel", 1)}, {"stem": 6, "channels": 10}
    for i, (token_hidden, channel_hidden) in enumerate([(7, 12), (9, 14)]):
        widths[f"token_hidden_{i}"] = (f"block_{i}/token_down/kernel", 0)
        widths[f"channel_hidden_{i}"] = (f"block_{i}/channel_up/bias", 0)
        sizes |= {f"token_hidden_{i}": token_hidden, f"channel_hidden_{i}": channel_hidden}

    def count(stem, channels, **sizes):
        total = conv_count(9, 2, stem) + dense_count(16 * stem, channels) + dense_count(channels, CLASSES)
        for i in range(2):
            token, channel = sizes[f"token_hidden_{i}"], sizes[f"channel_hidden_{i}"]
            total += 4 * channels + 2 * 4 * token
            total += dense_count(channels, channel) + dense_count(channel, channels)
        return total

    return Built(
        fn=fn,
        params=randomize(params, jax.random.key(64)),
        args=images(8, 8, 2),
        widths=widths,
        sizes=sizes,
        count=count,
    )


ENTRIES = [
    Entry("encoder-plain", encoder),
    Entry("decoder-plain", decoder),
    Entry("scan-plain", scanned),
    Entry("lstm-plain", lstm),
    Entry("mixer-plain", mixer),
]
