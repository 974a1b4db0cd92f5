"""Models of ``transformers`` in Flax, made from small configurations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.zoo.model import Entry, Model, integers, model, normal

WORDS = 50
SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
}
DECODER = {"vocab_size": WORDS, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}
PIXELS = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
IMAGE = {**PIXELS, "image_size": 16, "patch_size": 8, "initializer_range": 0.2}


def _make(name: str, config: str, options: dict, inputs: Callable[[], tuple], **more: Any) -> Model:
    import transformers

    made = getattr(transformers, name)(getattr(transformers, config)(**options), seed=0, **more)

    def fn(params: Any, *args: jax.Array) -> Any:
        return made(*args, params=params)[0]

    return model(fn, made.params, *inputs())


def _tokens() -> tuple:
    return (integers(WORDS, 2, 7),)


def _pair() -> tuple:
    """Those of an encoder, which of them count, and those of a decoder."""
    return (integers(WORDS, 2, 7), jnp.ones((2, 7), jnp.int32).at[1, 5:].set(0), integers(WORDS, 2, 5, seed=2))


def _image() -> tuple:
    return (normal(2, 3, 16, 16),)


BART = {
    "vocab_size": WORDS, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 36, "max_position_embeddings": 16,
    "init_std": 0.2,
}  # fmt: skip
GPT2 = {**DECODER, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16}
NEO = {
    **DECODER, "hidden_size": 24, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
    "window_size": 3, "max_position_embeddings": 16,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
CLIP = {
    "text_config": {**SMALL, "bos_token_id": 0, "eos_token_id": 1},
    "vision_config": {**PIXELS, "image_size": 16, "patch_size": 8},
    "projection_dim": 20,
}
WAVE = {
    **SMALL, "conv_dim": (16, 24), "conv_kernel": (5, 3), "conv_stride": (3, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
}  # fmt: skip
WHISPER = {**BART, "num_mel_bins": 10, "max_source_positions": 8, "max_target_positions": 8, "pad_token_id": 0}
STAGES = {"embedding_size": 12, "hidden_sizes": (16, 24), "depths": (2, 2), "layer_type": "bottleneck"}
ELECTRA = {**SMALL, "embedding_size": 16}
ALBERT = {**SMALL, "embedding_size": 16, "num_hidden_groups": 1}
DISTIL = {
    "vocab_size": WORDS, "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "max_position_embeddings": 16,
    "initializer_range": 0.2,
}  # fmt: skip
BLOOM = {**DECODER, "hidden_size": 24, "n_layer": 2, "n_head": 4}
GPTJ = {**GPT2, "rotary_dim": 4}
OPT = {**SMALL, "ffn_dim": 40, "word_embed_proj_dim": 24, "init_std": 0.2}
ROFORMER = {**SMALL, "embedding_size": 24}
GEMMA = {**GROUPED, "num_key_value_heads": 1, "head_dim": 6}
REGNET = {"embedding_size": 12, "hidden_sizes": (16, 24), "depths": (1, 2), "groups_width": 8, "layer_type": "y"}
XGLM = {
    "vocab_size": WORDS, "d_model": 24, "num_layers": 2, "attention_heads": 4, "ffn_dim": 40,
    "max_position_embeddings": 16, "init_std": 0.2,
}  # fmt: skip

_MADE: list[tuple[str, str, str, dict, Callable[[], tuple], dict]] = [
    ("BERT", "FlaxBertForMaskedLM", "BertConfig", SMALL, _tokens, {}),
    ("RoBERTa", "FlaxRobertaModel", "RobertaConfig", SMALL, _tokens, {}),
    ("DistilBERT", "FlaxDistilBertModel", "DistilBertConfig", DISTIL, _tokens, {}),
    ("ALBERT", "FlaxAlbertModel", "AlbertConfig", ALBERT, _tokens, {}),
    ("ELECTRA", "FlaxElectraModel", "ElectraConfig", ELECTRA, _tokens, {}),
    ("RoFormer", "FlaxRoFormerModel", "RoFormerConfig", ROFORMER, _tokens, {}),
    ("GPT-2", "FlaxGPT2LMHeadModel", "GPT2Config", GPT2, _tokens, {}),
    ("GPT-Neo", "FlaxGPTNeoForCausalLM", "GPTNeoConfig", NEO, _tokens, {}),
    ("GPT-J", "FlaxGPTJForCausalLM", "GPTJConfig", GPTJ, _tokens, {}),
    ("OPT", "FlaxOPTForCausalLM", "OPTConfig", OPT, _tokens, {}),
    ("BLOOM", "FlaxBloomForCausalLM", "BloomConfig", BLOOM, _tokens, {}),
    ("XGLM", "FlaxXGLMForCausalLM", "XGLMConfig", XGLM, _tokens, {}),
    ("Llama", "FlaxLlamaForCausalLM", "LlamaConfig", GROUPED, _tokens, {}),
    ("Mistral", "FlaxMistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 4}, _tokens, {}),
    ("Gemma", "FlaxGemmaForCausalLM", "GemmaConfig", GEMMA, _tokens, {}),
    ("BART", "FlaxBartForConditionalGeneration", "BartConfig", BART, _pair, {}),
    ("ViT", "FlaxViTForImageClassification", "ViTConfig", IMAGE, _image, {}),
    ("BEiT", "FlaxBeitModel", "BeitConfig", {**IMAGE, "use_relative_position_bias": True}, _image, {}),
    ("DINOv2", "FlaxDinov2Model", "Dinov2Config", {**IMAGE, "mlp_ratio": 2}, _image, {}),
    ("CLIP", "FlaxCLIPModel", "CLIPConfig", CLIP, lambda: (*_tokens(), *_image()), {}),
    ("ResNet", "FlaxResNetForImageClassification", "ResNetConfig", STAGES, _image, {}),
    ("RegNet", "FlaxRegNetForImageClassification", "RegNetConfig", REGNET, _image, {}),
    ("wav2vec 2.0", "FlaxWav2Vec2Model", "Wav2Vec2Config", WAVE, lambda: (normal(2, 60),), {"input_shape": (1, 60)}),
    (
        "Whisper", "FlaxWhisperForConditionalGeneration", "WhisperConfig", WHISPER,
        lambda: (normal(2, 10, 16), integers(WORDS, 2, 5)), {"input_shape": (1, 10, 16)},
    ),
]  # fmt: skip

ENTRIES = [
    Entry(name, "transformers", functools.partial(_make, kind, config, options, inputs, **more))
    for name, kind, config, options, inputs, more in _MADE
]
