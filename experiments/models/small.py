"""Small models with names from the literature. Each is a linen module: ``apply({"params": p}, x)`` gives logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

PyTree = Any


class LeNet300100(nn.Module):
    """Two hidden layers of 300 and 100 units (LeCun et al. 1998)."""

    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(300, name="dense_0")(x))
        x = nn.relu(nn.Dense(100, name="dense_1")(x))
        return nn.Dense(self.classes, name="head")(x)


def halved(x: jax.Array) -> jax.Array:
    """``nn.max_pool`` of windows of 2x2, by slices, whose gradient is quicker on a CPU."""
    rows = jnp.maximum(x[:, : x.shape[1] // 2 * 2 : 2], x[:, 1::2])
    return jnp.maximum(rows[:, :, : x.shape[2] // 2 * 2 : 2], rows[:, :, 1::2])


class CNN(nn.Module):
    """Two 3x3 convolutions with pooling, then one hidden layer."""

    classes: int = 10
    width: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(2):
            x = nn.relu(nn.Conv(self.width * 2**i, (3, 3), name=f"conv_{i}")(x))
            x = halved(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(4 * self.width, name="dense_0")(x))
        return nn.Dense(self.classes, name="head")(x)


class LeNet5(nn.Module):
    """LeNet-5 as in Caffe: 5x5x20, pool, 5x5x50, pool, 500 (Jia et al. 2014, arXiv:1408.5093).

    431,080 parameters at 28x28. Images smaller than 16x16 are padded, since two unpadded convolutions would leave
    nothing of them.
    """

    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        padding = "VALID" if min(x.shape[1:3]) >= 16 else "SAME"
        for i, features in enumerate((20, 50)):
            # Caffe has no nonlinearity between a convolution and its pooling here.
            x = nn.Conv(features, (5, 5), padding=padding, name=f"conv_{i}")(x)
            x = halved(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(500, name="dense_0")(x))
        return nn.Dense(self.classes, name="head")(x)


class Block(nn.Module):
    """Pre-norm causal attention and a feed-forward layer."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normed = nn.LayerNorm(name="norm_0")(x)
        query, key, value = (
            nn.Dense(self.width, use_bias=False, name=name)(normed).reshape(*x.shape[:2], self.heads, -1)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + nn.Dense(self.width, use_bias=False, name="out")(mixed.reshape(x.shape))
        normed = nn.LayerNorm(name="norm_1")(x)
        hidden = nn.gelu(nn.Dense(4 * self.width, name="up")(normed))
        return x + nn.Dense(self.width, name="down")(hidden)


class Transformer(nn.Module):
    """A decoder over bytes. ``width=384, layers=8, heads=6`` has 14.4M parameters."""

    classes: int = 256
    width: int = 128
    layers: int = 3
    heads: int = 4
    longest: int = 1024

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        place = self.param("position", nn.initializers.normal(0.02), (self.longest, self.width))
        x = nn.Embed(256, self.width, name="embed")(x.astype(jnp.int32)) + place[None, : x.shape[1]]
        for i in range(self.layers):
            x = Block(self.width, self.heads, name=f"block_{i}")(x)
        return nn.Dense(self.classes, use_bias=False, name="head")(nn.LayerNorm(name="norm")(x))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet_300_100": LeNet300100,
    "cnn": CNN,
    "lenet5": LeNet5,
    "transformer": Transformer,
}


def build(name: str, classes: int, options: Mapping[str, Any] | None = None) -> nn.Module:
    """The model called ``name``.

    Args:
      name: a key of ``MODELS``.
      classes: the number of outputs.
      options: fields of the module, such as ``{"width": 256, "layers": 6}``.

    Raises:
      ValueError: if the name or an option is unknown.
    """
    check(name)
    try:
        return MODELS[name](classes=classes, **(options or {}))
    except TypeError as error:
        raise ValueError(f"model {name!r}: {str(error).split('__init__() ')[-1]}") from None


def check(name: str, kind: str | None = None) -> None:
    """Raise if there is no such model, or it does not read data of this kind."""
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown; use one of {', '.join(MODELS)}")
    if kind == "text" and name != "transformer":
        raise ValueError(f"model {name!r} reads images, but the data is text; use 'transformer'")
    if kind == "image" and name == "transformer":
        raise ValueError("model 'transformer' reads text, but the data are images; use 'lenet_300_100' or 'cnn'")


def init(model: nn.Module, x: jax.Array, key: jax.Array) -> PyTree:
    """Fresh parameters for inputs shaped like ``x``."""
    return jax.jit(model.init)(key, x[:1])["params"]


def apply(model: nn.Module) -> Callable[[PyTree, jax.Array], jax.Array]:
    """The model as a function ``f(params, x)``."""
    return lambda params, x: cast(jax.Array, model.apply({"params": params}, x))
