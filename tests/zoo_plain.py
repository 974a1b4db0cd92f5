"""Layers in plain jax, as functions of dictionaries of arrays, and the convolutional models of the zoo."""

import jax
import jax.numpy as jnp
from jax import lax
from zoo_entry import Built, Entry, conv_count, dense_count, images, norm_conv_count, randomize

CLASSES = 3


# Shapes of layers, to be drawn by randomize.


def dense_params(inputs, outputs):
    return {"kernel": jnp.zeros((inputs, outputs)), "bias": jnp.zeros(outputs)}


def conv_params(window, inputs, outputs, bias=True):
    kernel = {"kernel": jnp.zeros((window, window, inputs, outputs))}
    return kernel | ({"bias": jnp.zeros(outputs)} if bias else {})


def batch_norm_params(channels):
    return {name: jnp.zeros(channels) for name in ("scale", "bias", "mean", "var")}


def norm_conv_params(window, inputs, outputs):
    return {"conv": conv_params(window, inputs, outputs, bias=False), "norm": batch_norm_params(outputs)}


# Layers.


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def conv(p, x, stride=1, padding="SAME", groups=1):
    y = lax.conv_general_dilated(
        x,
        p["kernel"],
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y + p["bias"] if "bias" in p else y


def batch_norm(p, x):
    return (x - p["mean"]) / jnp.sqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]


def norm_conv(p, x, stride=1, groups=1):
    return batch_norm(p["norm"], conv(p["conv"], x, stride, groups=groups))


def max_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def mean_pool(x):
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4


def lenet():
    def fn(p, x):
        x = max_pool(jax.nn.relu(conv(p["conv_0"], x)))
        x = max_pool(jax.nn.relu(conv(p["conv_1"], x)))
        x = x.reshape(x.shape[0], -1)
        x = jax.nn.tanh(dense(p["dense_0"], x))
        x = jax.nn.relu(dense(p["dense_1"], x))
        return jax.nn.log_softmax(dense(p["head"], x))

    params = {
        "conv_0": conv_params(3, 2, 6),
        "conv_1": conv_params(3, 6, 9),
        "dense_0": dense_params(4 * 9, 14),
        "dense_1": dense_params(14, 11),
        "head": dense_params(11, CLASSES),
    }
    return Built(
        fn=fn,
        params=randomize(params, jax.random.key(1)),
        args=images(8, 8, 2),
        widths={
            "conv_0": ("conv_0/kernel", 3),
            "conv_1": ("conv_1/kernel", 3),
            "dense_0": ("dense_0/kernel", 1),
            "dense_1": ("dense_1/kernel", 1),
        },
        sizes={"conv_0": 6, "conv_1": 9, "dense_0": 14, "dense_1": 11},
        count=lambda conv_0, conv_1, dense_0, dense_1: (
            conv_count(9, 2, conv_0)
            + conv_count(9, conv_0, conv_1)
            + dense_count(4 * conv_1, dense_0)
            + dense_count(dense_0, dense_1)
            + dense_count(dense_1, CLASSES)
        ),
    )


def vgg():
    def fn(p, x):
        x = jax.nn.relu(norm_conv(p["conv_0"], x))
        x = max_pool(jax.nn.relu(norm_conv(p["conv_1"], x)))
        x = max_pool(jax.nn.relu(norm_conv(p["conv_2"], x)))
        x = jnp.reshape(x, (x.shape[0], -1))
        x = jax.nn.relu(dense(p["dense"], x))
        return dense(p["head"], x)

    params = {
        "conv_0": norm_conv_params(3, 2, 7),
        "conv_1": norm_conv_params(3, 7, 8),
        "conv_2": norm_conv_params(3, 8, 10),
        "dense": dense_params(4 * 10, 13),
        "head": dense_params(13, CLASSES),
    }
    return Built(
        fn=fn,
        params=randomize(params, jax.random.key(2)),
        args=images(8, 8, 2),
        widths={f"conv_{i}": (f"conv_{i}/conv/kernel", 3) for i in range(3)} | {"dense": ("dense/kernel", 1)},
        sizes={"conv_0": 7, "conv_1": 8, "conv_2": 10, "dense": 13},
        count=lambda conv_0, conv_1, conv_2, dense: (
            norm_conv_count(9, 2, conv_0)
            + norm_conv_count(9, conv_0, conv_1)
            + norm_conv_count(9, conv_1, conv_2)
            + dense_count(4 * conv_2, dense)
            + dense_count(dense, CLASSES)
        ),
    )


def residual_block(p, x, stride=1):
    y = jax.nn.relu(norm_conv(p["conv_0"], x, stride))
    y = norm_conv(p["conv_1"], y)
    if "shortcut" in p:
        x = norm_conv(p["shortcut"], x, stride)
    return jax.nn.relu(x + y)


def resnet():
    def fn(p, x):
        x = jax.nn.relu(norm_conv(p["stem"], x))
        x = residual_block(p["block_0"], x)
        x = residual_block(p["block_1"], x, stride=2)
        x = residual_block(p["block_2"], x)
        return dense(p["head"], x.mean(axis=(1, 2)))

    params = {
        "stem": norm_conv_params(3, 2, 6),
        "block_0": {"conv_0": norm_conv_params(3, 6, 9), "conv_1": norm_conv_params(3, 9, 6)},
        "block_1": {
            "conv_0": norm_conv_params(3, 6, 11),
            "conv_1": norm_conv_params(3, 11, 8),
            "shortcut": norm_conv_params(1, 6, 8),
        },
        "block_2": {"conv_0": norm_conv_params(3, 8, 7), "conv_1": norm_conv_params(3, 7, 8)},
        "head": dense_params(8, CLASSES),
    }
    return Built(
        fn=fn,
        params=randomize(params, jax.random.key(3)),
        args=images(8, 8, 2),
        widths={
            "stage_0": ("stem/conv/kernel", 3),
            "stage_1": ("block_1/shortcut/conv/kernel", 3),
            "inner_0": ("block_0/conv_0/conv/kernel", 3),
            "inner_1": ("block_1/conv_0/conv/kernel", 3),
            "inner_2": ("block_2/conv_0/conv/kernel", 3),
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


def densenet():
    def grow(p, x):
        new = conv(p["conv"], jax.nn.relu(batch_norm(p["norm"], x)))
        return jnp.concatenate([x, new], axis=-1)

    def fn(p, x):
        x = grow(p["layer_1"], grow(p["layer_0"], conv(p["stem"], x)))
        x = mean_pool(conv(p["transition"]["conv"], jax.nn.relu(batch_norm(p["transition"]["norm"], x))))
        x = grow(p["layer_2"], x)
        return dense(p["head"], jax.nn.relu(batch_norm(p["norm"], x)).mean((1, 2)))

    def layer(window, inputs, outputs):
        return {"norm": batch_norm_params(inputs), "conv": conv_params(window, inputs, outputs, bias=False)}

    params = {
        "stem": conv_params(3, 2, 6),
        "layer_0": layer(3, 6, 4),
        "layer_1": layer(3, 10, 5),
        "transition": layer(1, 15, 7),
        "layer_2": layer(3, 7, 8),
        "norm": batch_norm_params(15),
        "head": dense_params(15, CLASSES),
    }

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

    return Built(
        fn=fn,
        params=randomize(params, jax.random.key(4)),
        args=images(8, 8, 2),
        widths={
            "stem": ("stem/kernel", 3),
            "growth_0": ("layer_0/conv/kernel", 3),
            "growth_1": ("layer_1/conv/kernel", 3),
            "transition": ("transition/conv/kernel", 3),
            "growth_2": ("layer_2/conv/kernel", 3),
        },
        sizes={"stem": 6, "growth_0": 4, "growth_1": 5, "transition": 7, "growth_2": 8},
        count=count,
    )


def inverted_residual_params(inputs, expanded, squeezed, outputs):
    return {
        "expand": norm_conv_params(1, inputs, expanded),
        "depthwise": norm_conv_params(3, 1, expanded),
        "squeeze": dense_params(expanded, squeezed),
        "excite": dense_params(squeezed, expanded),
        "project": norm_conv_params(1, expanded, outputs),
    }


def inverted_residual(p, x, stride=1):
    y = jax.nn.relu6(norm_conv(p["expand"], x))
    y = jax.nn.relu6(norm_conv(p["depthwise"], y, stride, groups=y.shape[-1]))
    gate = jax.nn.relu(dense(p["squeeze"], y.mean((1, 2))))
    gate = jax.nn.sigmoid(dense(p["excite"], gate))
    y = norm_conv(p["project"], y * gate[:, None, None, :])
    return x + y if x.shape == y.shape else y


def inverted_residual_count(inputs, expanded, squeezed, outputs):
    return (
        norm_conv_count(1, inputs, expanded)
        + norm_conv_count(9, 1, expanded)
        + dense_count(expanded, squeezed)
        + dense_count(squeezed, expanded)
        + norm_conv_count(1, expanded, outputs)
    )


def mobilenet():
    def fn(p, x):
        x = jax.nn.relu6(norm_conv(p["stem"], x))
        x = inverted_residual(p["block_0"], x)
        x = inverted_residual(p["block_1"], x, stride=2)
        x = jax.nn.relu6(norm_conv(p["last"], x))
        return dense(p["head"], jnp.mean(x, axis=(1, 2)))

    params = {
        "stem": norm_conv_params(3, 2, 6),
        "block_0": inverted_residual_params(6, 14, 5, 6),
        "block_1": inverted_residual_params(6, 16, 4, 9),
        "last": norm_conv_params(1, 9, 12),
        "head": dense_params(12, CLASSES),
    }
    return Built(
        fn=fn,
        params=randomize(params, jax.random.key(5)),
        args=images(8, 8, 2),
        widths={
            "stem": ("stem/conv/kernel", 3),
            "expanded_0": ("block_0/expand/conv/kernel", 3),
            "squeezed_0": ("block_0/squeeze/kernel", 1),
            "expanded_1": ("block_1/depthwise/conv/kernel", 3),
            "squeezed_1": ("block_1/squeeze/kernel", 1),
            "projected": ("block_1/project/conv/kernel", 3),
            "last": ("last/conv/kernel", 3),
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
            + norm_conv_count(1, projected, last)
            + dense_count(last, CLASSES)
        ),
    )


def unet():
    def upsample_repeat(x):
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)

    def upsample_resize(x):
        batch, height, width, channels = x.shape
        return jax.image.resize(x, (batch, 2 * height, 2 * width, channels), "nearest")

    def fn(p, x):
        fine = jax.nn.relu(conv(p["down_0"], x))
        coarse = jax.nn.relu(conv(p["down_1"], max_pool(fine)))
        x = jax.nn.relu(conv(p["middle"], max_pool(coarse)))
        x = jnp.concatenate([coarse, upsample_repeat(x)], axis=-1)
        x = jax.nn.relu(conv(p["up_1"], x))
        x = jnp.concatenate([upsample_resize(x), fine], axis=-1)
        x = jax.nn.relu(conv(p["up_0"], x))
        return conv(p["head"], x)

    params = {
        "down_0": conv_params(3, 2, 6),
        "down_1": conv_params(3, 6, 9),
        "middle": conv_params(3, 9, 11),
        "up_1": conv_params(3, 9 + 11, 8),
        "up_0": conv_params(3, 8 + 6, 5),
        "head": conv_params(1, 5, CLASSES),
    }
    return Built(
        fn=fn,
        params=randomize(params, jax.random.key(6)),
        args=images(8, 8, 2),
        widths={name: (f"{name}/kernel", 3) for name in ("down_0", "down_1", "middle", "up_1", "up_0")},
        sizes={"down_0": 6, "down_1": 9, "middle": 11, "up_1": 8, "up_0": 5},
        count=lambda down_0, down_1, middle, up_1, up_0: (
            conv_count(9, 2, down_0)
            + conv_count(9, down_0, down_1)
            + conv_count(9, down_1, middle)
            + conv_count(9, down_1 + middle, up_1)
            + conv_count(9, up_1 + down_0, up_0)
            + conv_count(1, up_0, CLASSES)
        ),
    )


def grouped():
    """Six groups of a convolution, two of a norm: the channels are a product of three."""

    def group_norm(p, x, groups):
        y = x.reshape(*x.shape[:-1], groups, -1)
        mean = jnp.mean(y, axis=(1, 2, 4), keepdims=True)
        var = jnp.var(y, axis=(1, 2, 4), keepdims=True)
        return ((y - mean) * lax.rsqrt(var + 1e-5)).reshape(x.shape) * p["scale"] + p["bias"]

    def fn(p, x):
        x = jax.nn.relu(conv(p["stem"], x, stride=2))
        x = conv(p["grouped"], x, groups=6)
        x = jax.nn.relu(group_norm(p["norm"], x, groups=2))
        return dense(p["head"], x.reshape(x.shape[0], -1))

    params = {
        "stem": conv_params(3, 2, 6 * 4),
        "grouped": conv_params(3, 4, 6 * 5),
        "norm": {"scale": jnp.zeros(30), "bias": jnp.zeros(30)},
        "head": dense_params(16 * 30, CLASSES),
    }

    def count(outer, inner, stem, channels):
        groups = outer * inner
        return (
            conv_count(9, 2, groups * stem)
            + conv_count(9, stem, groups * channels)
            + 2 * groups * channels
            + dense_count(16 * groups * channels, CLASSES)
        )

    return Built(
        fn=fn,
        params=randomize(params, jax.random.key(7)),
        args=images(8, 8, 2),
        widths={
            "outer": ("norm/scale", 0),
            "inner": ("norm/scale", 0),
            "stem": ("grouped/kernel", 2),
            "channels": ("norm/scale", 0),
        },
        sizes={"outer": 2, "inner": 3, "stem": 4, "channels": 5},
        count=count,
    )


ENTRIES = [
    Entry("lenet-plain", lenet),
    Entry("vgg-plain", vgg),
    Entry("resnet-plain", resnet),
    Entry("densenet-plain", densenet),
    Entry("mobilenet-plain", mobilenet),
    Entry("unet-plain", unet),
    Entry("grouped-plain", grouped),
]
