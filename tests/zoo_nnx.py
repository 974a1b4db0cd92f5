"""Models of the zoo in Flax NNX: the parameters are the state, which ``fn`` merges with the graph."""

import jax
import jax.numpy as jnp
from flax import nnx
from zoo_entry import Built, Entry, conv_count, dense_count, features, images, randomize, tokens

CLASSES = 3


def build(module, args, seed, **known):
    graph, shapes = nnx.split(nnx.eval_shape(lambda: module(rngs=nnx.Rngs(0))))

    def fn(state, *args):
        return nnx.merge(graph, state)(*args)

    return Built(fn=fn, params=randomize(shapes, jax.random.key(seed)), args=args, **known)


class MLP(nnx.Module):
    def __init__(self, *, rngs):
        self.first = nnx.Linear(5, 12, rngs=rngs)
        self.second = nnx.Linear(12, 10, rngs=rngs)
        self.head = nnx.Linear(10, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x))
        x = nnx.gelu(self.second(x), approximate=False)
        return self.head(x)


def mlp():
    return build(
        MLP,
        features(5),
        40,
        widths={"first": ("first/kernel", 1), "second": ("second/kernel", 1)},
        sizes={"first": 12, "second": 10},
        count=lambda first, second: dense_count(5, first) + dense_count(first, second) + dense_count(second, CLASSES),
    )


class DenseLayer(nnx.Module):
    def __init__(self, window, inputs, outputs, *, rngs):
        self.norm = nnx.BatchNorm(inputs, use_running_average=True, rngs=rngs)
        self.conv = nnx.Conv(inputs, outputs, (window, window), use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.conv(nnx.relu(self.norm(x)))


class DenseNet(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = nnx.Conv(2, 6, (3, 3), rngs=rngs)
        self.layer_0 = DenseLayer(3, 6, 4, rngs=rngs)
        self.layer_1 = DenseLayer(3, 10, 5, rngs=rngs)
        self.transition = DenseLayer(1, 15, 7, rngs=rngs)
        self.layer_2 = DenseLayer(3, 7, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(15, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(15, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = [self.stem(x)]
        x.append(self.layer_0(jnp.concatenate(x, axis=-1)))
        x.append(self.layer_1(jnp.concatenate(x, axis=-1)))
        x = nnx.avg_pool(self.transition(jnp.concatenate(x, axis=-1)), (2, 2), strides=(2, 2))
        x = jnp.concatenate([x, self.layer_2(x)], axis=-1)
        return self.head(nnx.relu(self.norm(x)).mean(axis=(1, 2)))


def densenet():
    def count(stem, growth_0, growth_1, transition, growth_2):
        first, second, last = stem + growth_0, stem + growth_0 + growth_1, transition + growth_2
        return (
            conv_count(9, 2, stem)
            + (4 * stem + 9 * stem * growth_0)
            + (4 * first + 9 * first * growth_1)
            + (4 * second + second * transition)
            + (4 * transition + 9 * transition * growth_2)
            + 4 * last
            + dense_count(last, CLASSES)
        )

    return build(
        DenseNet,
        images(8, 8, 2),
        41,
        widths={
            "stem": ("stem/bias", 0),
            "growth_0": ("layer_0/conv/kernel", 3),
            "growth_1": ("layer_1/conv/kernel", 3),
            "transition": ("transition/conv/kernel", 3),
            "growth_2": ("layer_2/conv/kernel", 3),
        },
        sizes={"stem": 6, "growth_0": 4, "growth_1": 5, "transition": 7, "growth_2": 8},
        count=count,
    )


class UNet(nnx.Module):
    def __init__(self, *, rngs):
        self.down_0 = nnx.Conv(2, 6, (3, 3), rngs=rngs)
        self.down_1 = nnx.Conv(6, 9, (3, 3), rngs=rngs)
        self.middle = nnx.Conv(9, 11, (3, 3), rngs=rngs)
        self.lift_1 = nnx.ConvTranspose(11, 10, (2, 2), strides=(2, 2), rngs=rngs)
        self.up_1 = nnx.Conv(9 + 10, 8, (3, 3), rngs=rngs)
        self.lift_0 = nnx.ConvTranspose(8, 7, (3, 3), strides=(2, 2), rngs=rngs)
        self.up_0 = nnx.Conv(6 + 7, 5, (3, 3), rngs=rngs)
        self.head = nnx.Conv(5, CLASSES, (1, 1), rngs=rngs)

    def __call__(self, x):
        fine = nnx.relu(self.down_0(x))
        coarse = nnx.relu(self.down_1(nnx.max_pool(fine, (2, 2), strides=(2, 2))))
        x = nnx.relu(self.middle(nnx.max_pool(coarse, (2, 2), strides=(2, 2))))
        x = nnx.relu(self.up_1(jnp.concatenate([coarse, self.lift_1(x)], axis=-1)))
        x = nnx.relu(self.up_0(jnp.concatenate([fine, self.lift_0(x)], axis=-1)))
        return self.head(x)


def unet():
    sizes = {"down_0": 6, "down_1": 9, "middle": 11, "lift_1": 10, "up_1": 8, "lift_0": 7, "up_0": 5}
    return build(
        UNet,
        images(8, 8, 2),
        42,
        widths={name: (f"{name}/kernel", 3) for name in sizes},
        sizes=sizes,
        count=lambda down_0, down_1, middle, lift_1, up_1, lift_0, up_0: (
            conv_count(9, 2, down_0)
            + conv_count(9, down_0, down_1)
            + conv_count(9, down_1, middle)
            + conv_count(4, middle, lift_1)
            + conv_count(9, down_1 + lift_1, up_1)
            + conv_count(9, up_1, lift_0)
            + conv_count(9, down_0 + lift_0, up_0)
            + conv_count(1, up_0, CLASSES)
        ),
    )


class GroupedQueryAttention(nnx.Module):
    """Each key and value head serves several query heads; queries are reshaped to show which."""

    def __init__(self, width, kv_heads, queries, head_dim, *, rngs):
        self.kv_heads = kv_heads
        self.query = nnx.LinearGeneral(width, (kv_heads * queries, head_dim), use_bias=False, rngs=rngs)
        self.key = nnx.LinearGeneral(width, (kv_heads, head_dim), use_bias=False, rngs=rngs)
        self.value = nnx.LinearGeneral(width, (kv_heads, head_dim), use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral((kv_heads * queries, head_dim), width, axis=(-2, -1), use_bias=False, rngs=rngs)

    def __call__(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        batch, length, heads, head_dim = q.shape
        q = q.reshape(batch, length, self.kv_heads, heads // self.kv_heads, head_dim)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k) / jnp.sqrt(head_dim)
        mask = jnp.tril(jnp.ones((length, length), bool))
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        y = jnp.einsum("bkgts,bskd->btkgd", nnx.softmax(scores, axis=-1), v)
        return self.out(y.reshape(batch, length, heads, head_dim))


class DecoderBlock(nnx.Module):
    def __init__(self, width, kv_heads, queries, head_dim, hidden, *, rngs):
        self.norm_0 = nnx.RMSNorm(width, rngs=rngs)
        self.attention = GroupedQueryAttention(width, kv_heads, queries, head_dim, rngs=rngs)
        self.norm_1 = nnx.RMSNorm(width, rngs=rngs)
        self.gate = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(hidden, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm_0(x))
        y = self.norm_1(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Decoder(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(13, 10, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((7, 10)))
        self.block_0 = DecoderBlock(10, 2, 3, 4, 14, rngs=rngs)
        self.block_1 = DecoderBlock(10, 3, 2, 5, 16, rngs=rngs)
        self.norm = nnx.RMSNorm(10, rngs=rngs)
        self.head = nnx.Linear(10, 13, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.positions
        x = self.block_1(self.block_0(x))
        return self.head(self.norm(x))


def decoder():
    widths, sizes = {"width": ("embed/embedding", 1)}, {"width": 10}
    for i, (kv_heads, queries, head_dim, hidden) in enumerate([(2, 3, 4, 14), (3, 2, 5, 16)]):
        widths |= {
            f"kv_heads_{i}": (f"block_{i}/attention/key/kernel", 1),
            f"queries_{i}": (f"block_{i}/attention/query/kernel", 1),
            f"qk_{i}": (f"block_{i}/attention/key/kernel", 2),
            f"v_{i}": (f"block_{i}/attention/out/kernel", 1),
            f"hidden_{i}": (f"block_{i}/down/kernel", 0),
        }
        sizes |= {f"kv_heads_{i}": kv_heads, f"queries_{i}": queries}
        sizes |= {f"qk_{i}": head_dim, f"v_{i}": head_dim, f"hidden_{i}": hidden}

    def count(width, **sizes):
        total = (13 + 7 + 1 + 13) * width
        for i in range(2):
            kv, queries, qk, v, hidden = (sizes[f"{n}_{i}"] for n in ("kv_heads", "queries", "qk", "v", "hidden"))
            total += 2 * width + width * kv * (queries + 1) * (qk + v) + 3 * width * hidden
        return total

    return build(Decoder, tokens(7, 13), 43, widths=widths, sizes=sizes, count=count)


class Encoder(nnx.Module):
    """Pre-norm blocks with the attention that NNX ships."""

    def __init__(self, *, rngs):
        self.embed = nnx.Linear(5, 10, rngs=rngs)
        self.norm_0 = nnx.LayerNorm(10, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 10, 4 * 6, decode=False, rngs=rngs)
        self.norm_1 = nnx.LayerNorm(10, rngs=rngs)
        self.up = nnx.Linear(10, 14, rngs=rngs)
        self.down = nnx.Linear(14, 10, rngs=rngs)
        self.head = nnx.Linear(10, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        x = x + self.attention(self.norm_0(x))
        x = x + self.down(nnx.gelu(self.up(self.norm_1(x))))
        return self.head(x[:, 0])


def encoder():
    return build(
        Encoder,
        features(6, 5),
        44,
        widths={
            "width": ("embed/kernel", 1),
            "heads": ("attention/query/bias", 0),
            "qk": ("attention/key/kernel", 2),
            "v": ("attention/out/kernel", 1),
            "hidden": ("up/kernel", 1),
        },
        sizes={"width": 10, "heads": 4, "qk": 6, "v": 6, "hidden": 14},
        count=lambda width, heads, qk, v, hidden: (
            dense_count(5, width)
            + 4 * width
            + (width + 1) * heads * (2 * qk + v)
            + dense_count(heads * v, width)
            + dense_count(width, hidden)
            + dense_count(hidden, width)
            + dense_count(width, CLASSES)
        ),
    )


class MixerBlock(nnx.Module):
    def __init__(self, tokens, token_hidden, channels, channel_hidden, *, rngs):
        self.norm_0 = nnx.LayerNorm(channels, rngs=rngs)
        self.token_up = nnx.Linear(tokens, token_hidden, rngs=rngs)
        self.token_down = nnx.Linear(token_hidden, tokens, rngs=rngs)
        self.norm_1 = nnx.LayerNorm(channels, rngs=rngs)
        self.channel_up = nnx.Linear(channels, channel_hidden, rngs=rngs)
        self.channel_down = nnx.Linear(channel_hidden, channels, rngs=rngs)

    def __call__(self, x):
        y = jnp.swapaxes(self.norm_0(x), 1, 2)
        y = self.token_down(nnx.gelu(self.token_up(y)))
        x = x + jnp.swapaxes(y, 1, 2)
        return x + self.channel_down(nnx.gelu(self.channel_up(self.norm_1(x))))


class Mixer(nnx.Module):
    def __init__(self, *, rngs):
        self.patches = nnx.Conv(2, 10, (4, 4), strides=(4, 4), rngs=rngs)
        self.block_0 = MixerBlock(4, 7, 10, 12, rngs=rngs)
        self.block_1 = MixerBlock(4, 9, 10, 14, rngs=rngs)
        self.head = nnx.Linear(10, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = self.block_1(self.block_0(x))
        return self.head(x.mean(axis=1))


def mixer():
    widths = {"channels": ("patches/kernel", 3)}
    for i in range(2):
        widths[f"token_hidden_{i}"] = (f"block_{i}/token_up/kernel", 1)
        widths[f"channel_hidden_{i}"] = (f"block_{i}/channel_up/kernel", 1)

    def count(channels, **sizes):
        total = conv_count(16, 2, channels) + dense_count(channels, CLASSES)
        for i in range(2):
            token, channel = sizes[f"token_hidden_{i}"], sizes[f"channel_hidden_{i}"]
            total += 4 * channels + dense_count(4, token) + dense_count(token, 4)
            total += dense_count(channels, channel) + dense_count(channel, channels)
        return total

    return build(
        Mixer,
        images(8, 8, 2),
        45,
        widths=widths,
        sizes={
            "channels": 10,
            "token_hidden_0": 7,
            "channel_hidden_0": 12,
            "token_hidden_1": 9,
            "channel_hidden_1": 14,
        },
        count=count,
        optional={"channels": "the biases of the token mixing give every cut channel the same value at each token"},
    )


ENTRIES = [
    Entry("mlp-nnx", mlp),
    Entry("densenet-nnx", densenet),
    Entry("unet-nnx", unet),
    Entry("decoder-nnx", decoder),
    Entry("encoder-nnx", encoder),
    Entry("mixer-nnx", mixer),
]
