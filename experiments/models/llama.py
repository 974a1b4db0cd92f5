"""A decoder language model as a plain function of a nested dictionary of arrays: the Llama architecture.

Root-mean-square norms (Zhang & Sennrich 2019, arXiv:1910.07467), rotary positions (Su et al. 2021, arXiv:2104.09864),
queries in groups that share a key and a value (Ainslie et al. 2023, arXiv:2305.13245), a gated feed-forward layer
(Shazeer 2020, arXiv:2002.05202), as in Touvron et al. 2023 (arXiv:2302.13971). ``config.json`` of most open decoders
describes this with other numbers.

Parameters, kernels (in, out)::

    embed/embedding                      (vocab, width), the last product too where the model is tied
    layers/0/attention_norm/scale        (width,)
    layers/0/attention/q/kernel          (width, heads * head_dim); k and v (width, kv_heads * head_dim)
    layers/0/attention/out/kernel        (heads * head_dim, width)
    layers/0/mlp_norm/scale              (width,)
    layers/0/mlp/gate/kernel             (width, hidden); up alike; down (hidden, width)
    norm/scale                           (width,)
    head/kernel                          (width, vocab), where the model is not tied

Stacked for ``jax.lax.scan`` there is one dictionary of layers, ``layers/attention/q/kernel``, with a leading axis;
:func:`stack` and :func:`unstack` go from one to the other. :func:`apply` sees by itself which it has. Numbers of heads
and channels are read from the parameters, so layers may differ after some are cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Config:
    """What is fixed about a decoder: everything but its parameters.

    Attributes:
      vocab: number of tokens.
      width: of the residual stream.
      layers: their number.
      heads: of queries.
      kv_heads: of keys and values; each serves ``heads // kv_heads`` neighbouring heads of queries.
      head_dim: channels of a head, even.
      hidden: channels of the feed-forward layer.
      theta: base of the rotary wavelengths.
      eps: added to the mean square in every norm.
      tied: the last product uses the table of embeddings.
      longest: positions that the model was trained on.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    theta: float = 10_000.0
    eps: float = 1e-5
    tied: bool = True
    longest: int = 2048

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}, expected whole groups of queries"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd, expected pairs of channels to rotate")

    @classmethod
    def smollm2_135m(cls) -> Config:
        """SmolLM2-135M (Ben Allal et al. 2025, arXiv:2502.02737)."""
        return cls(49_152, 576, 30, 9, 3, 64, 1536, theta=100_000.0, longest=8192)

    @classmethod
    def tiny(cls, vocab: int = 256) -> Config:
        """A model for tests and notebooks, with every part that the large ones have."""
        return cls(vocab, 64, 2, 4, 2, 16, 128, longest=128)


def init(key: jax.Array, config: Config, stacked: bool = False, dtype: Any = jnp.float32) -> PyTree:
    """Random parameters: normal, of variance 1 / inputs, what enters the residual stream smaller by depth.

    Args:
      key: of the random numbers.
      config: the model.
      stacked: layers with a leading axis, as ``scan`` takes them. The values are the same.
      dtype: of every leaf.
    """
    ends, inner = jax.random.split(key)
    layers = [_init_layer(k, config, dtype) for k in jax.random.split(inner, config.layers)]
    table, last = jax.random.split(ends)
    params = {
        "embed": {"embedding": 0.02 * jax.random.normal(table, (config.vocab, config.width), dtype)},
        "layers": layers,
        "norm": {"scale": jnp.ones((config.width,), dtype)},
    }
    if not config.tied:
        params["head"] = _kernel(last, config.width, config.vocab, dtype)
    return stack(params) if stacked else params


def _init_layer(key: jax.Array, config: Config, dtype: Any) -> PyTree:
    keys = iter(jax.random.split(key, 7))
    queries, keyed = config.heads * config.head_dim, config.kv_heads * config.head_dim
    width, hidden, less = config.width, config.hidden, (2 * config.layers) ** -0.5
    return {
        "attention_norm": {"scale": jnp.ones((width,), dtype)},
        "attention": {
            "q": _kernel(next(keys), width, queries, dtype),
            "k": _kernel(next(keys), width, keyed, dtype),
            "v": _kernel(next(keys), width, keyed, dtype),
            "out": _kernel(next(keys), queries, width, dtype, less),
        },
        "mlp_norm": {"scale": jnp.ones((width,), dtype)},
        "mlp": {
            "gate": _kernel(next(keys), width, hidden, dtype),
            "up": _kernel(next(keys), width, hidden, dtype),
            "down": _kernel(next(keys), hidden, width, dtype, less),
        },
    }


def _kernel(key: jax.Array, inputs: int, outputs: int, dtype: Any, gain: float = 1.0) -> PyTree:
    return {"kernel": gain * inputs**-0.5 * jax.random.normal(key, (inputs, outputs), dtype)}


def stack(params: PyTree) -> PyTree:
    """The same parameters with layers as one dictionary of arrays with a leading axis."""
    return {**params, "layers": jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])}


def unstack(params: PyTree) -> PyTree:
    """The same parameters with layers as a list."""
    layers = params["layers"]
    count = jax.tree.leaves(layers)[0].shape[0]
    return {**params, "layers": [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)]}


def init_cache(
    config: Config,
    batch: int,
    length: int,
    stacked: bool = False,
    dtype: Any = jnp.float32,
    store: Callable[[jax.Array], Any] | None = None,
) -> PyTree:
    """An empty cache of keys and values: ``layers``, as the parameters have them, and the ``length`` used so far.

    Args:
      config: the model.
      batch: sequences.
      length: tokens that fit. More are written over the last ones: the caller counts.
      stacked: for stacked parameters.
      dtype: of keys and values.
      store: gives for an array (batch, tokens, kv_heads, head_dim) what is kept in its place, a
        :class:`jcompress.Compressed` whose leaves have the tokens on axis 1 too, such as
        ``jc.quantize.Int(bits=8, ...)``; pass the same to :func:`apply`.
    """
    shape = (batch, length, config.kv_heads, config.head_dim)
    store = store or (lambda x: x)
    layers = [{name: store(jnp.zeros(shape, dtype)) for name in ("k", "v")} for _ in range(config.layers)]
    cache = {"layers": layers, "length": jnp.zeros((), jnp.int32)}
    return stack(cache) if stacked else cache


def apply(
    params: PyTree,
    tokens: jax.Array,
    config: Config,
    *,
    cache: PyTree = None,
    positions: jax.Array | None = None,
    remat: bool = False,
    dtype: Any = jnp.float32,
    store: Callable[[jax.Array], Any] | None = None,
) -> Any:
    """Logits of the next token at every position.

    Args:
      params: dense, as :func:`init` gives them, stacked or not.
      tokens: integers (batch, length).
      config: the model.
      cache: from :func:`init_cache`: the tokens follow those that it holds. Prefill is a call with many tokens,
        decoding one with a single token.
      positions: int32 (length,) or (batch, length); by default 0, 1, ... after those in the cache. A token sees
        those at its position and before.
      remat: recompute each layer in the backward pass instead of keeping what it computed.
      dtype: of products and the residual stream; norms, softmax and logits are float32.
      store: as in :func:`init_cache`.

    Returns:
      float32 (batch, length, vocab); with a cache a pair of that and the cache with these tokens in it.
    """
    layers, held = params["layers"], None if cache is None else cache["layers"]
    if positions is None:
        start = 0 if cache is None else cache["length"]
        positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)

    def step(x: jax.Array, layer: tuple[PyTree, PyTree]) -> tuple[jax.Array, PyTree]:
        start = None if cache is None else cache["length"]
        return block(layer[0], x, config, positions, cache=layer[1], start=start, store=store)

    step = jax.checkpoint(step) if remat else step
    x = embed(params, tokens, dtype)
    if isinstance(layers, dict):
        x, held = jax.lax.scan(step, x, (layers, held))
    else:
        kept = []
        for i, layer in enumerate(layers):
            x, new = step(x, (layer, None if held is None else held[i]))
            kept.append(new)
        held = kept
    logits = head(params, x, config)
    return logits if cache is None else (logits, {"layers": held, "length": cache["length"] + tokens.shape[1]})


def embed(params: PyTree, tokens: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """The residual stream before the first layer, (batch, length, width)."""
    return params["embed"]["embedding"][tokens].astype(dtype)


def head(params: PyTree, x: jax.Array, config: Config) -> jax.Array:
    """Logits, float32 (batch, length, vocab), of the residual stream after the last layer."""
    x = norm(params["norm"], x, config.eps)
    if config.tied:
        table = params["embed"]["embedding"].astype(x.dtype)
        return jnp.einsum("bsd,vd->bsv", x, table, preferred_element_type=jnp.float32)
    return jnp.matmul(x, params["head"]["kernel"].astype(x.dtype), preferred_element_type=jnp.float32)


def block(
    layer: PyTree,
    x: jax.Array,
    config: Config,
    positions: jax.Array,
    *,
    cache: PyTree = None,
    start: jax.Array | None = None,
    store: Callable[[jax.Array], Any] | None = None,
) -> tuple[jax.Array, PyTree]:
    """One layer: attention, then the gated feed-forward layer, each on the normed stream and added to it.

    Args:
      layer: its parameters.
      x: the residual stream (batch, length, width).
      config: the model.
      positions: int32 (length,) or (batch, length).
      cache: this layer's ``k`` and ``v``.
      start: tokens that the cache holds.
      store: as in :func:`init_cache`.

    Returns:
      The residual stream and the layer's cache.
    """
    mixed, cache = attention(
        layer["attention"], norm(layer["attention_norm"], x, config.eps), config, positions, cache, start, store
    )
    x = x + mixed
    return x + mlp(layer["mlp"], norm(layer["mlp_norm"], x, config.eps)), cache


def norm(params: PyTree, x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean of x**2 + eps) * scale, computed in float32."""
    wide = x.astype(jnp.float32)
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(square + eps) * params["scale"].astype(jnp.float32)).astype(x.dtype)


def mlp(params: PyTree, x: jax.Array) -> jax.Array:
    """(silu(x gate) * (x up)) down."""
    return dense(params["down"], jax.nn.silu(dense(params["gate"], x)) * dense(params["up"], x))


def dense(params: PyTree, x: jax.Array) -> jax.Array:
    return x @ params["kernel"].astype(x.dtype)


def attention(
    params: PyTree,
    x: jax.Array,
    config: Config,
    positions: jax.Array,
    cache: PyTree = None,
    start: jax.Array | None = None,
    store: Callable[[jax.Array], Any] | None = None,
) -> tuple[jax.Array, PyTree]:
    """Causal attention of grouped queries, and the cache with these keys and values; arguments as in :func:`block`."""
    split = x.shape[:2]
    q, k, v = (dense(params[name], x).reshape(*split, -1, config.head_dim) for name in ("q", "k", "v"))
    q, k, places = rotate(q, positions, config.theta), rotate(k, positions, config.theta), positions
    if cache is not None:
        cache = {name: _write(cache[name], new, start, store) for name, new in (("k", k), ("v", v))}
        k, v = (_read(cache[name]).astype(x.dtype) for name in ("k", "v"))
        places = jnp.arange(k.shape[1], dtype=jnp.int32)
    weights = attend(q, k, config, positions, places).astype(x.dtype)
    mixed = jnp.einsum("bkgqs,bskd->bqkgd", weights, v).reshape(*split, -1)
    return dense(params["out"], mixed), cache


def attend(q: jax.Array, k: jax.Array, config: Config, positions: jax.Array, places: jax.Array) -> jax.Array:
    """Attention weights, float32 (batch, kv_heads, group, queries, keys).

    Args:
      q: rotated queries (batch, length, heads, head_dim).
      k: rotated keys (batch, tokens, kv_heads, head_dim).
      config: the model.
      positions: int32 (length,) or (batch, length), of the queries.
      places: int32 (tokens,) or (batch, tokens), of the keys.
    """
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, config.head_dim)
    logits = jnp.einsum("bqkgd,bskd->bkgqs", grouped, k, preferred_element_type=jnp.float32)
    seen = places[..., None, :] <= positions[..., :, None]
    seen = seen[..., None, None, :, :]
    return jax.nn.softmax(jnp.where(seen, logits * np.float32(config.head_dim**-0.5), -1e30), axis=-1)


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary positions: channels i of both halves are a pair, turned by position / theta**(i / half).

    Args:
      x: (batch, length, heads, head_dim).
      positions: int32 (length,) or (batch, length).
      theta: base of the wavelengths.
    """
    half = x.shape[-1] // 2
    rates = theta ** (-np.arange(half, dtype=np.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * rates
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _write(held: Any, new: jax.Array, start: Any, store: Callable[[jax.Array], Any] | None) -> Any:
    """The cache with these tokens in it, array by array of what is stored."""
    new = new.astype(held.dtype) if store is None else store(new)
    return jax.tree.map(lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, start, axis=1), held, new)


def _read(held: Any) -> jax.Array:
    return held.materialize() if hasattr(held, "materialize") else held


def loss(
    params: PyTree, tokens: jax.Array, config: Config, *, remat: bool = False, dtype: Any = jnp.float32
) -> jax.Array:
    """Mean cross-entropy, in nats, of each token of a batch (batch, length) after those before it."""
    return jnp.mean(losses(apply(params, tokens, config, remat=remat, dtype=dtype), tokens))


def losses(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Cross-entropy, in nats (batch, length - 1), of each token but the first.

    Args:
      logits: (batch, length or length - 1, vocab); those of the last token, which nothing follows, do not count.
      tokens: (batch, length).
    """
    targets = tokens[:, 1:]
    logits = logits[:, : targets.shape[1]]
    true = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - true
