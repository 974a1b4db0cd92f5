"""Windows of tokens, and the perplexity of a decoder in them, a layer at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments.models import llama

PyTree = Any


def windows(tokens: np.ndarray, length: int, count: int, part: str) -> np.ndarray:
    """Windows one behind the other, each with one more token, whose prediction counts too.

    Args:
      tokens: of a text.
      length: tokens that are predicted in a window.
      count: windows.
      part: ``"first"`` or ``"second"`` half of the text.

    Returns:
      int32 (count, length + 1).

    Raises:
      ValueError: if that half has fewer.
    """
    middle = len(tokens) // 2
    half = tokens[:middle] if part == "first" else tokens[middle:]
    if len(half) < count * length + 1:
        raise ValueError(
            f"the {part} half of the text has {len(half)} tokens, expected {count * length + 1}; ask for fewer windows"
        )
    return np.stack([half[i * length : (i + 1) * length + 1] for i in range(count)]).astype(np.int32)


@functools.partial(jax.jit, static_argnames="config")
def layer(params: PyTree, x: jax.Array, config: llama.Config) -> jax.Array:
    """One layer on the residual stream."""
    return llama.block(params, x, config, jnp.arange(x.shape[1], dtype=jnp.int32))[0]


@functools.partial(jax.jit, static_argnames=("config", "store"))
def cached(params: PyTree, x: jax.Array, config: llama.Config, store: Callable[[jax.Array], Any]) -> jax.Array:
    """The same where keys and values are read as a cache keeps them."""
    cache = llama.init_cache(llama.dataclasses.replace(config, layers=1), *x.shape[:2], store=store)["layers"][0]
    places, start = jnp.arange(x.shape[1], dtype=jnp.int32), jnp.int32(0)
    return llama.block(params, x, config, places, cache=cache, start=start, store=store)[0]


@functools.partial(jax.jit, static_argnames="config")
def losses(ends: PyTree, x: jax.Array, window: jax.Array, config: llama.Config) -> jax.Array:
    """Cross-entropy, in nats, of each token of a window but the first, from the last layer's stream."""
    return llama.losses(llama.head(ends, x, config), window)


def ends(params: PyTree) -> PyTree:
    """What is in no layer, dense."""
    return jc.materialize({name: x for name, x in params.items() if name != "layers"})


def perplexity(
    params: PyTree, config: llama.Config, found: np.ndarray, store: Callable[[jax.Array], Any] | None = None
) -> float:
    """The exponential of the mean loss of all predicted tokens; one layer is dense at a time.

    Args:
      params: with nodes, layers as a list.
      config: the model.
      found: from :func:`windows`.
      store: how keys and values are kept, as :func:`experiments.models.llama.init_cache` takes it.
    """
    run = layer if store is None else functools.partial(cached, store=store)
    outer = ends(params)
    streams = [llama.embed(outer, window[None, :-1]) for window in found]
    for part in params["layers"]:
        dense = jc.materialize(part)
        streams = [run(dense, x, config) for x in streams]
    total = [losses(outer, x, window[None], config) for x, window in zip(streams, found, strict=True)]
    return float(np.exp(np.mean(total)))


def of_file(path: str, tokenizer: Any) -> np.ndarray:
    """The tokens of a text file."""
    with open(path, encoding="utf-8") as file:
        return np.array(tokenizer.encode(file.read()).ids, np.int32)
