"""Models of the zoo in Flax linen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from zoo_entry import Built, Entry, conv_count, dense_count, features, images, norm_conv_count, randomize, tokens

CLASSES = 3


def build(module, args, seed, **known):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args(2, jax.random.key(0)))
    return Built(fn=module.apply, params=randomize(shapes, jax.random.key(seed)), args=args, **known)


class LeNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(nn.relu(nn.Conv(6, (3, 3))(x)), (2, 2), strides=(2, 2))
        x = nn.avg_pool(nn.tanh(nn.Conv(9, (3, 3))(x)), (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(14)(x))
        x = nn.relu(nn.Dense(11)(x))
        return nn.Dense(CLASSES)(x)


def lenet():
    names = {"conv_0": "Conv_0", "conv_1": "Conv_1", "dense_0": "Dense_0", "dense_1": "Dense_1"}
    return build(
        LeNet(),
        images(8, 8, 2),
        20,
        widths={name: (f"params/{layer}/kernel", 3 if "conv" in name else 1) for name, layer in names.items()},
        sizes={"conv_0": 6, "conv_1": 9, "dense_0": 14, "dense_1": 11},
        count=lambda conv_0, conv_1, dense_0, dense_1: (
            conv_count(9, 2, conv_0)
            + conv_count(9, conv_0, conv_1)
            + dense_count(4 * conv_1, dense_0)
            + dense_count(dense_0, dense_1)
            + dense_count(dense_1, CLASSES)
        ),
    )


class VGG(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate((7, 8, 10)):
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not self.train)(x))
            if i > 0:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(13)(x))
        x = nn.Dropout(0.5, deterministic=True)(x)
        return nn.Dense(CLASSES)(x)


def vgg(train=False):
    model = build(
        VGG(),
        images(8, 8, 2),
        21,
        widths={f"conv_{i}": (f"params/Conv_{i}/kernel", 3) for i in range(3)}
        | {"dense": ("params/Dense_0/kernel", 1)},
        sizes={"conv_0": 7, "conv_1": 8, "conv_2": 10, "dense": 13},
        count=lambda conv_0, conv_1, conv_2, dense: (
            norm_conv_count(9, 2, conv_0)
            + norm_conv_count(9, conv_0, conv_1)
            + norm_conv_count(9, conv_1, conv_2)
            + dense_count(4 * conv_2, dense)
            + dense_count(dense, CLASSES)
        ),
    )
    if not train:
        return model

    def fn(variables, x):
        logits, updates = VGG(train=True).apply(variables, x, mutable=["batch_stats"])
        return logits, updates["batch_stats"]

    return dataclasses.replace(model, fn=fn, free_outputs="1/.*")


class ResidualBlock(nn.Module):
    inner: int
    outer: int
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        y = nn.Conv(self.inner, (3, 3), self.strides, use_bias=False)(x)
        y = nn.relu(norm()(y))
        y = norm(scale_init=nn.initializers.zeros_init())(nn.Conv(self.outer, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = nn.Conv(self.outer, (1, 1), self.strides, use_bias=False, name="projection")(x)
            x = norm(name="projection_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        x = ResidualBlock(9, 6)(x)
        x = ResidualBlock(11, 8, (2, 2))(x)
        x = ResidualBlock(7, 8)(x)
        return nn.Dense(CLASSES)(jnp.mean(x, axis=(1, 2)))


def resnet():
    return build(
        ResNet(),
        images(8, 8, 2),
        22,
        widths={
            "stage_0": ("params/Conv_0/kernel", 3),
            "stage_1": ("batch_stats/ResidualBlock_1/projection_norm/mean", 0),
            "inner_0": ("params/ResidualBlock_0/Conv_0/kernel", 3),
            "inner_1": ("params/ResidualBlock_1/Conv_0/kernel", 3),
            "inner_2": ("params/ResidualBlock_2/Conv_0/kernel", 3),
        },
        sizes={"stage_0": 6, "stage_1": 8, "inner_0": 9, "inner_1": 11, "inner_2": 7},
        count=lambda stage_0, stage_1, inner_0, inner_1, inner_2: (
            norm_conv_count(9, 2, stage_0)
            + norm_conv_count(9, stage_0, inner_0)
            + norm_conv_count(9, inner_0, stage_0)
            + norm_conv_count(9, stage_0, inner_1)
            + norm_conv_count(9, inner_1, stage_1)
            + norm_conv_count(1, stage_0, stage_1)
            + norm_conv_count(9, stage_1, inner_2)
            + norm_conv_count(9, inner_2, stage_1)
            + dense_count(stage_1, CLASSES)
        ),
    )


class SqueezeExcite(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        gate = jnp.mean(x, axis=(1, 2), keepdims=True)
        gate = nn.relu(nn.Conv(self.width, (1, 1))(gate))
        return x * nn.sigmoid(nn.Conv(x.shape[-1], (1, 1))(gate))


class InvertedResidual(nn.Module):
    expanded: int
    squeezed: int
    outer: int
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        y = nn.hard_swish(norm()(nn.Conv(self.expanded, (1, 1), use_bias=False)(x)))
        y = nn.Conv(self.expanded, (3, 3), self.strides, feature_group_count=self.expanded, use_bias=False)(y)
        y = SqueezeExcite(self.squeezed)(nn.hard_swish(norm()(y)))
        y = norm()(nn.Conv(self.outer, (1, 1), use_bias=False)(y))
        return x + y if x.shape == y.shape else y


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), use_bias=False)(x)
        x = nn.hard_swish(nn.BatchNorm(use_running_average=True)(x))
        x = InvertedResidual(14, 5, 6)(x)
        x = InvertedResidual(16, 4, 9, (2, 2))(x)
        x = nn.hard_swish(nn.Conv(12, (1, 1))(x))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def inverted_residual_count(inputs, expanded, squeezed, outputs):
    return (
        norm_conv_count(1, inputs, expanded)
        + norm_conv_count(9, 1, expanded)
        + conv_count(1, expanded, squeezed)
        + conv_count(1, squeezed, expanded)
        + norm_conv_count(1, expanded, outputs)
    )


def mobilenet():
    return build(
        MobileNet(),
        images(8, 8, 2),
        23,
        widths={
            "stem": ("params/Conv_0/kernel", 3),
            "expanded_0": ("params/InvertedResidual_0/Conv_0/kernel", 3),
            "squeezed_0": ("params/InvertedResidual_0/SqueezeExcite_0/Conv_0/kernel", 3),
            "expanded_1": ("params/InvertedResidual_1/Conv_1/kernel", 3),
            "squeezed_1": ("params/InvertedResidual_1/SqueezeExcite_0/Conv_0/bias", 0),
            "projected": ("params/InvertedResidual_1/Conv_2/kernel", 3),
            "last": ("params/Conv_1/kernel", 3),
        },
        sizes={
            "stem": 6,
            "expanded_0": 14,
            "squeezed_0": 5,
            "expanded_1": 16,
            "squeezed_1": 4,
            "projected": 9,
            "last": 12,
        },
        count=lambda stem, expanded_0, squeezed_0, expanded_1, squeezed_1, projected, last: (
            norm_conv_count(9, 2, stem)
            + inverted_residual_count(stem, expanded_0, squeezed_0, stem)
            + inverted_residual_count(stem, expanded_1, squeezed_1, projected)
            + conv_count(1, projected, last)
            + dense_count(last, CLASSES)
        ),
    )


class Grouped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4 * 3, (3, 3), strides=(2, 2))(x))
        x = nn.Conv(4 * 5, (3, 3), feature_group_count=4)(x)
        x = nn.relu(nn.GroupNorm(num_groups=4)(x))
        return nn.Dense(CLASSES)(x.reshape(x.shape[0], -1))


def grouped():
    return build(
        Grouped(),
        images(8, 8, 2),
        24,
        widths={
            "groups": ("params/Conv_0/bias", 0),
            "stem": ("params/Conv_1/kernel", 2),
            "channels": ("params/GroupNorm_0/scale", 0),
        },
        sizes={"groups": 4, "stem": 3, "channels": 5},
        count=lambda groups, stem, channels: (
            conv_count(9, 2, groups * stem)
            + conv_count(9, stem, groups * channels)
            + 2 * groups * channels
            + dense_count(16 * groups * channels, CLASSES)
        ),
    )


class EncoderBlock(nn.Module):
    heads: int
    head_dim: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(
            self.heads, qkv_features=self.heads * self.head_dim, dropout_rate=0.1, deterministic=True
        )
        x = x + attention(nn.LayerNorm()(x))
        y = nn.Dense(self.hidden)(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(y))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(13, 10)(tokens)
        x = x + self.param("positions", nn.initializers.normal(), (7, 10))
        x = EncoderBlock(4, 6, 14)(x)
        x = EncoderBlock(3, 5, 16)(x)
        return nn.Dense(CLASSES)(nn.LayerNorm()(x).mean(axis=1))


def attention_count(width, heads, qk, v):
    return 2 * (width + 1) * heads * qk + (width + 1) * heads * v + dense_count(heads * v, width)


def encoder():
    widths, sizes = {"width": ("params/Embed_0/embedding", 1)}, {"width": 10}
    for i, (heads, head_dim, hidden) in enumerate([(4, 6, 14), (3, 5, 16)]):
        attention = f"params/EncoderBlock_{i}/MultiHeadDotProductAttention_0"
        widths |= {
            f"heads_{i}": (f"{attention}/query/kernel", 1),
            f"qk_{i}": (f"{attention}/query/kernel", 2),
            f"v_{i}": (f"{attention}/value/kernel", 2),
            f"hidden_{i}": (f"params/EncoderBlock_{i}/Dense_0/kernel", 1),
        }
        sizes |= {f"heads_{i}": heads, f"qk_{i}": head_dim, f"v_{i}": head_dim, f"hidden_{i}": hidden}

    def block_count(width, heads, qk, v, hidden):
        mlp = dense_count(width, hidden) + dense_count(hidden, width)
        return 4 * width + attention_count(width, heads, qk, v) + mlp

    def count(width, heads_0, qk_0, v_0, hidden_0, heads_1, qk_1, v_1, hidden_1):
        return (
            (13 + 7) * width
            + block_count(width, heads_0, qk_0, v_0, hidden_0)
            + block_count(width, heads_1, qk_1, v_1, hidden_1)
            + 2 * width
            + dense_count(width, CLASSES)
        )

    return build(Encoder(), tokens(7, 13), 25, widths=widths, sizes=sizes, count=count)


class ScannedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        mask = nn.make_causal_mask(jnp.zeros(x.shape[:2]))
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(3, qkv_features=3 * 4, name="attention")(y, mask=mask)
        y = nn.Dense(14)(nn.RMSNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.silu(y)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(10)(x)
        layers = nn.scan(
            nn.remat(ScannedBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(CLASSES)(nn.LayerNorm()(x))


def scanned():
    layer = "params/layers"
    return build(
        Scanned(),
        features(6, 5),
        26,
        widths={
            "width": ("params/Dense_0/kernel", 1),
            "heads": (f"{layer}/attention/out/kernel", 1),
            "qk": (f"{layer}/attention/key/kernel", 3),
            "v": (f"{layer}/attention/out/kernel", 2),
            "hidden": (f"{layer}/Dense_0/kernel", 2),
        },
        sizes={"width": 10, "heads": 3, "qk": 4, "v": 4, "hidden": 14},
        count=lambda width, heads, qk, v, hidden: (
            dense_count(5, width)
            + 2 * (3 * width + attention_count(width, heads, qk, v))
            + 2 * (dense_count(width, hidden) + dense_count(hidden, width))
            + 2 * width
            + dense_count(width, CLASSES)
        ),
    )


class LSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6)(x))
        x = nn.RNN(nn.OptimizedLSTMCell(9))(x)
        return nn.Dense(CLASSES)(x[:, -1])


def lstm():
    return build(
        LSTM(),
        features(7, 5),
        27,
        widths={"inputs": ("params/Dense_0/kernel", 1), "hidden": ("params/OptimizedLSTMCell_0/hf/kernel", 0)},
        sizes={"inputs": 6, "hidden": 9},
        count=lambda inputs, hidden: (
            dense_count(5, inputs) + 4 * (inputs * hidden + dense_count(hidden, hidden)) + dense_count(hidden, CLASSES)
        ),
    )


ENTRIES = [
    Entry("lenet-linen", lenet),
    Entry("vgg-linen", vgg),
    Entry("vgg-train-linen", functools.partial(vgg, train=True)),
    Entry("resnet-linen", resnet),
    Entry("mobilenet-linen", mobilenet),
    Entry("grouped-linen", grouped),
    Entry("encoder-linen", encoder),
    Entry("scan-linen", scanned),
    Entry("lstm-linen", lstm),
]
