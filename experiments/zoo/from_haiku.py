"""Networks of ``dm-haiku``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.zoo.model import Entry, Model, integers, model, normal


def _make(network: Callable[..., Any], *args: jax.Array) -> Model:
    """Parameters and state together, so that the statistics of norms are cut too; the new state is left out."""
    import haiku as hk

    made = hk.transform_with_state(network)
    first = hk.transform_with_state(lambda *args: network(*args, training=True))  # norms start their averages then
    tree = dict(zip(("params", "state"), first.init(jax.random.key(0), *args), strict=True))

    def fn(tree: Any, *args: jax.Array) -> Any:
        return made.apply(tree["params"], tree["state"], None, *args)[0]

    return model(fn, tree, *args)


def resnet(version: bool) -> Model:
    import haiku as hk

    def network(x: jax.Array, training: bool = False) -> jax.Array:
        return hk.nets.ResNet((1, 1, 1, 1), 10, resnet_v2=version, channels_per_group=(16, 20, 24, 28))(x, training)

    return _make(network, normal(2, 32, 32, 3))


def mobilenet() -> Model:
    import haiku as hk

    def network(x: jax.Array, training: bool = False) -> jax.Array:
        return hk.nets.MobileNetV1((1, 2, 1), (16, 24, 32), num_classes=10)(x, training)

    return _make(network, normal(2, 16, 16, 3))


def lstm() -> Model:
    import haiku as hk

    def network(words: jax.Array, training: bool = False) -> jax.Array:
        x = hk.Embed(30, 12)(words)
        core = hk.DeepRNN([hk.LSTM(18), jnp.tanh, hk.GRU(14)])
        y, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
        return hk.Linear(5)(y)

    return _make(network, integers(30, 3, 6))


def quantizer() -> Model:
    """A vector-quantized autoencoder."""
    import haiku as hk

    def network(x: jax.Array, training: bool = False) -> jax.Array:
        z = hk.Conv2D(8, 3, 2)(jax.nn.relu(hk.Conv2D(16, 4, 2)(x)))
        z = hk.nets.VectorQuantizer(8, 20, 0.25)(z, is_training=training)["quantize"]
        return hk.Conv2DTranspose(3, 4, 2)(jax.nn.relu(hk.Conv2DTranspose(16, 4, 2)(z)))

    return _make(network, normal(2, 16, 16, 3))


def attention() -> Model:
    import haiku as hk

    def network(words: jax.Array, training: bool = False) -> jax.Array:
        x = hk.Embed(30, 24)(words)
        init = hk.initializers.VarianceScaling(2.0)
        y = hk.LayerNorm(-1, True, True)(x)
        x = x + hk.MultiHeadAttention(4, 6, w_init=init, value_size=5, model_size=24)(y, y, y)
        x = x + hk.nets.MLP([40, 24], activation=jax.nn.gelu)(hk.RMSNorm(-1)(x))
        return hk.Linear(30)(x)

    return _make(network, integers(30, 2, 7))


ENTRIES = [
    Entry("ResNet v1", "dm-haiku", lambda: resnet(False)),
    Entry("ResNet v2", "dm-haiku", lambda: resnet(True)),
    Entry("MobileNet v1", "dm-haiku", mobilenet),
    Entry("LSTM and GRU", "dm-haiku", lstm),
    Entry("VQ-VAE", "dm-haiku", quantizer),
    Entry("transformer block", "dm-haiku", attention),
]
