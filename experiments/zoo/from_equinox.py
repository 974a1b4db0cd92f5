"""Layers of ``equinox`` put together as its documentation does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from experiments.zoo.model import Entry, Model, integers, model, normal


def batched(made: Any, *args: jax.Array, **options: Any) -> Model:
    """A module of one example, as ``vmap`` makes it one of a batch."""
    import equinox as eqx

    arrays, static = eqx.partition(made, eqx.is_array)

    def fn(arrays: Any, *args: jax.Array) -> Any:
        return jax.vmap(lambda *x: eqx.combine(arrays, static)(*x, **options))(*args)

    return model(fn, arrays, *args)


def mlp() -> Model:
    import equinox as eqx

    return batched(eqx.nn.MLP(5, 3, 24, 3, activation=jax.nn.gelu, key=jax.random.key(0)), normal(6, 5))


def cnn() -> Model:
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 5)
    layers = [
        eqx.nn.Conv2d(3, 12, 3, padding=1, key=keys[0]),
        eqx.nn.GroupNorm(4, 12),
        eqx.nn.Lambda(jax.nn.silu),
        eqx.nn.Conv2d(12, 16, 3, padding=1, groups=4, key=keys[1]),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.MaxPool2d(2, 2),
        eqx.nn.ConvTranspose2d(16, 6, 2, 2, key=keys[2]),
        eqx.nn.AdaptiveAvgPool2d(2),
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(24, 20, key=keys[3]),
        eqx.nn.LayerNorm(20),
        eqx.nn.Linear(20, 4, key=keys[4]),
    ]
    return batched(eqx.nn.Sequential(layers), normal(2, 3, 8, 8))


def attention() -> Model:
    import equinox as eqx

    made = eqx.nn.MultiheadAttention(
        4, 24, qk_size=5, vo_size=6, use_query_bias=True, use_value_bias=True, key=jax.random.key(0)
    )
    x = normal(2, 7, 24)
    return batched(made, x, x, x)


def recurrent(kind: str) -> Model:
    """The example of the documentation: a cell under ``lax.scan``, then a linear layer."""
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 3)
    made = (
        eqx.nn.Embedding(30, 10, key=keys[0]),
        getattr(eqx.nn, kind)(10, 18, key=keys[1]),
        eqx.nn.Linear(18, 3, key=keys[2]),
    )
    arrays, static = eqx.partition(made, eqx.is_array)

    def one(arrays: Any, words: jax.Array) -> jax.Array:
        embedding, cell, linear = eqx.combine(arrays, static)
        start = jnp.zeros(18) if kind == "GRUCell" else (jnp.zeros(18), jnp.zeros(18))
        last, _ = jax.lax.scan(lambda state, x: (cell(x, state), None), start, jax.vmap(embedding)(words))
        return linear(last if kind == "GRUCell" else last[0])

    return model(lambda p, words: jax.vmap(lambda w: one(p, w))(words), arrays, integers(30, 3, 6))


ENTRIES = [
    Entry("MLP", "equinox", mlp),
    Entry("CNN with groups", "equinox", cnn),
    Entry("attention", "equinox", attention),
    Entry("GRU", "equinox", lambda: recurrent("GRUCell")),
    Entry("LSTM", "equinox", lambda: recurrent("LSTMCell")),
]
