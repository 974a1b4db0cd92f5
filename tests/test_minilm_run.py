"""The rows of the sentence encoder's table, on a random encoder: made, continued, refused; training of the student."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from experiments import minilm as command
from experiments import runner
from experiments.configs import families_sts
from experiments.configs import minilm as full
from experiments.families import encoder, ways
from experiments.models import minilm
from experiments.quantization import recipes, selfdistill, sts
from tests.test_minilm import ENCODER, HEADS, LAYERS, bert

Int = jc.quantize.Int
WORDS = [chr(97 + i) for i in range(25)]


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly():
    """Nothing is compared to the last bit, and each function runs a few times."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights, tokenizer and pairs as the command reads them; words are letters."""
    tokenizers = pytest.importorskip("tokenizers")
    safetensors = pytest.importorskip("safetensors.numpy")
    path, rng = tmp_path_factory.mktemp("model"), np.random.default_rng(0)
    safetensors.save_file({k: v.astype(np.float32) for k, v in bert(rng).items()}, path / "model.safetensors")
    config = {"num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "layer_norm_eps": ENCODER.epsilon}
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(path / "tokenizer.json"))
    for name in ("images", "headlines"):
        pairs = [[" ".join(rng.choice(WORDS, rng.integers(2, 12))) for _ in range(2)] for _ in range(60)]
        lines = [f"{'' if i % 2 else i % 7}\t{a}\t{b}\n" for i, (a, b) in enumerate(pairs)]
        (path / f"sts2015_{name}.tsv").write_text("".join(lines))
    return path


def tiny(only="", **changes):
    training = selfdistill.Training(steps=2, batch_size=16)
    method = jc.chain(Int(bits=4, group_size=4), full.HALF)
    rules = ((recipes.KERNELS, method), (".*", full.HALF))
    ways = (
        recipes.recipe("plain", "one", changes.get("plain", rules)),
        recipes.recipe("trained", "two", rules, corrected=True, training=training),
    )
    widths = {"4 bits": {"fine": Int(bits=8), "coarse": Int(bits=2)}}
    return recipes.Config(ways, widths, only=only, validation=10, calibration=16, calibration_length=16)


def test_rows_are_made_once_and_stored_as_measured(folder, tmp_path):
    shown = runner.run(command.Encoding(tiny(), folder, folder, tmp_path))
    before = (tmp_path / "results.jsonl").read_text()
    rows = {row["name"]: row for row in map(json.loads, before.splitlines())}
    assert list(rows) == ["dense", "plain", "trained", "4 bits"]
    errors = rows.pop("4 bits")["errors"]
    assert rows["dense"]["cosine"] == pytest.approx(1.0, abs=1e-5)
    for name, row in rows.items():
        assert row["bytes"] == (tmp_path / "models" / f"{name}.jc").stat().st_size
        assert row["mean"] == pytest.approx((row["images"] + row["headlines"]) / 2)
    assert rows["plain"]["bytes"] == pytest.approx(rows["trained"]["bytes"], abs=64)
    assert all(errors["fine"][path] < errors["coarse"][path] for path in errors["coarse"])
    assert len(errors["fine"]) == 6 * LAYERS
    assert "trained" in shown
    assert (tmp_path / "pareto.png").exists()

    runner.run(command.Encoding(tiny(), folder, folder, tmp_path))
    assert (tmp_path / "results.jsonl").read_text() == before
    other = command.Encoding(tiny(plain=((".*", full.HALF),)), folder, folder, tmp_path)
    with pytest.raises(ValueError, match=r"another setting .*plain"):
        runner.run(other)


def test_wrong_names_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"config.only: 'nothing' is unknown; use some of plain,trained"):
        command.Encoding(tiny(only="plain,nothing"), folder, folder, tmp_path)
    with pytest.raises(FileNotFoundError, match="snapshot_download"):
        command.Encoding(tiny(), tmp_path, folder, tmp_path)


def test_every_way_of_the_config_takes_the_encoder():
    """Plans are made from shapes; methods that cannot take a leaf say so then."""
    width, hidden = 384, 1536
    dense = {name: {"kernel": (width, width), "bias": (width,)} for name in ("query", "key", "value", "out")}
    dense |= {
        "up": {"kernel": (width, hidden), "bias": (hidden,)},
        "down": {"kernel": (hidden, width), "bias": (width,)},
    }
    dense |= {name: {"scale": (width,), "bias": (width,)} for name in ("norm_0", "norm_1")}
    tables = {name: {"embedding": (n, width)} for name, n in {"token": 30522, "position": 512, "type": 2}.items()}
    shapes = {"embeddings": {**tables, "norm": dense["norm_0"]}, **{f"layer_{i}": dense for i in range(6)}}
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    grids = [full.gptq(4), full.affine_grid(2), full.kmeans(3), jc.quantize.Rotation(full.gptq(2))]
    for kernels in (*grids, jc.quantize.AWQ(full.affine_grid(3)), jc.quantize.LQER(rank=8, grid=full.affine_grid(2))):
        assert len(jc.plan(params, full.rules(kernels, full.table(4)))) == 6 * 16 + 5
    names = [way.name for way in full.get_config().ways]
    assert len(names) == len(set(names)) == 64
    assert all(json.dumps(way.told(None)) for way in full.get_config().ways)


@pytest.mark.parametrize("method", [Int(3, 4), Int(2, 8, symmetric=False), jc.quantize.NF4(group_size=8)], ids=repr)
def test_the_student_sees_its_codes_and_both_its_parts_get_a_gradient(rng, method):
    w = jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)
    node = method(w)
    moved, scale = w + 0.3, 0.7 * node.scale
    there = selfdistill.fake(node, moved, scale)
    levels = node.encode(moved).levels(jnp.float32)
    factor, size = jnp.repeat(scale, method.group_size, 0), method.group_size
    np.testing.assert_allclose(there, factor * levels, rtol=1e-5, atol=1e-6)
    assert bool((node.encode(moved).codes != node.codes).any())
    g = jnp.asarray(rng.normal(size=w.shape), jnp.float32)
    to_w, to_scale = jax.grad(lambda w, s: jnp.sum(g * selfdistill.fake(node, w, s)), argnums=(0, 1))(moved, scale)
    np.testing.assert_allclose(to_w, 0.7 * g, rtol=1e-5)
    np.testing.assert_allclose(to_scale, (g * levels).reshape(-1, size, 3).sum(1), rtol=1e-4, atol=1e-5)


def test_training_brings_the_student_nearer(rng):
    params = minilm.from_bert(bert(rng), 1)
    tokens = [rng.integers(5, 30, n).tolist() for n in rng.integers(3, 12, 120)]
    plan = jc.plan(params, [(recipes.KERNELS, jc.chain(Int(3, 4), full.HALF)), (".*", full.HALF)])
    tree = jc.compress(params, plan)
    training = selfdistill.Training(steps=40, learning_rate=1e-2, batch_size=32)
    trained = selfdistill.train(ENCODER, params, tree, tokens, training)
    assert jax.tree.structure(trained) == jax.tree.structure(tree)
    assert jc.nbits(trained) == jc.nbits(tree)
    unseen = [rng.integers(5, 30, n).tolist() for n in rng.integers(3, 12, 60)]
    judge = sts.Judge(ENCODER)
    dense, before, after = (judge.embed(jc.materialize(t), unseen) for t in (params, tree, trained))
    assert np.mean((after - dense) ** 2) < 0.7 * np.mean((before - dense) ** 2)


def test_the_interval_of_a_difference_holds_it_and_is_nothing_for_the_same_encoder(rng):
    from experiments.quantization.difference import interval

    x = rng.standard_normal((60, 2, 8)).astype(np.float32)
    scores = sts.similarity(x) + 0.1 * rng.standard_normal(60)
    noisy = x + 0.5 * rng.standard_normal(x.shape).astype(np.float32)
    assert interval([(x, scores)], [(x, scores)], draws=20) == (0.0, 0.0, 0.0)
    difference, low, high = interval([(x, scores)], [(noisy, scores)], draws=200)
    assert 0 < low <= difference <= high


TRIED = {"whitened SVD": 1, "chosen ranks": 1, "units": 1, "shared blocks of 4": -1, "GPTQ": 1}


@pytest.mark.parametrize(("name", "point"), TRIED.items())
def test_a_family_is_taught_by_the_encoder_itself(folder, tmp_path, name, point):
    for file in folder.glob("*.tsv"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "minilm").symlink_to(folder)
    rng = np.random.default_rng(1)
    (tmp_path / "sentences.txt").write_text("\n".join(" ".join(rng.choice(WORDS, 5)) for _ in range(80)))
    config = dataclasses.replace(families_sts.get_config(), finetuning=3, batch_size=16, calibration=32)
    lab = encoder.Sentences(config, str(tmp_path), longest=8, held=8)
    dense = lab.size(ways.Network(lab.dense(0)))
    assert dense["multiply_adds"] == 8 * LAYERS * (4 * 12 * 12 + 2 * 12 * 20 + 2 * 8 * 12)
    family = next(family for family in ways.FAMILIES if family.name == name)
    network = family.make(lab, 0, family.points[point])
    size = lab.size(network)
    assert size["bytes"] < dense["bytes"] and size["multiply_adds"] <= dense["multiply_adds"]
    after = lab.finetuned(network, 0)
    assert jax.tree.structure(after.tree) == jax.tree.structure(network.tree)
    assert any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (after.tree, network.tree)), strict=True))
    assert -1 <= lab.score(after, 0)["test_spearman"] <= 1
