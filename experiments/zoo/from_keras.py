"""Networks of ``keras`` on its JAX backend."""

from __future__ import annotations

import os
from typing import Any

import jax

from experiments.zoo.model import Entry, Model, integers, model, normal


def _keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    if keras.backend.backend() != "jax":
        raise ImportError("the backend of keras is not jax; set KERAS_BACKEND=jax")
    keras.utils.set_random_seed(0)
    return keras


def _make(made: Any, *args: jax.Array) -> Model:
    """Variables by their paths, those of norms too."""
    kinds = ("trainable_variables", "non_trainable_variables")
    tree = {
        kind: {f"{i:03d}.{v.path.replace('/', '.')}": v.value for i, v in enumerate(getattr(made, kind))}
        for kind in kinds
    }

    def fn(tree: Any, *args: jax.Array) -> Any:
        values = (list(tree[kind].values()) for kind in kinds)
        return made.stateless_call(*values, *args, training=False)[0]

    return model(fn, tree, *args)


def mobilenet(version: str) -> Model:
    make = getattr(_keras().applications, version)
    return _make(make(input_shape=(32, 32, 3), alpha=0.25, weights=None, classes=5), normal(2, 32, 32, 3))


def separable() -> Model:
    layers = (keras := _keras()).layers
    image = keras.Input((16, 16, 3))
    x = layers.SeparableConv2D(16, 3, padding="same", depth_multiplier=2)(image)
    x = layers.BatchNormalization()(x)
    x = keras.activations.swish(x)
    y = layers.Conv2DTranspose(12, 3, padding="same")(layers.SpatialDropout2D(0.1)(x))
    x = layers.Concatenate()([x, layers.PReLU(shared_axes=[1, 2])(y)])
    x = layers.GlobalAveragePooling2D()(layers.GroupNormalization(4)(x))
    return _make(keras.Model(image, layers.Dense(5, "softmax")(layers.UnitNormalization()(x))), normal(2, 16, 16, 3))


def recurrent() -> Model:
    layers = (keras := _keras()).layers
    words = keras.Input((6,), dtype="int32")
    x = layers.Embedding(30, 10)(words)
    x = layers.Bidirectional(layers.LSTM(12, return_sequences=True))(x)
    x = layers.GRU(14, reset_after=True)(x)
    return _make(keras.Model(words, layers.Dense(5)(x)), integers(30, 3, 6))


def transformer() -> Model:
    layers = (keras := _keras()).layers
    words = keras.Input((7,), dtype="int32")
    x = layers.Embedding(30, 24)(words)
    x = x + layers.GroupQueryAttention(6, 4, 2)(x, x, use_causal_mask=True)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 6)(x, x))
    y = layers.EinsumDense("abc,cde->abde", output_shape=(None, 4, 10), bias_axes="de")(x)
    y = layers.EinsumDense("abde,dec->abc", output_shape=(None, 24), bias_axes="c")(keras.activations.gelu(y))
    return _make(keras.Model(words, layers.Dense(30)(layers.LayerNormalization()(x + y))), integers(30, 2, 7))


ENTRIES = [
    Entry("MobileNet", "keras", lambda: mobilenet("MobileNet")),
    Entry("MobileNetV3", "keras", lambda: mobilenet("MobileNetV3Small")),
    Entry("separable and transposed", "keras", separable),
    Entry("bidirectional LSTM and GRU", "keras", recurrent),
    Entry("attention and einsum", "keras", transformer),
]
