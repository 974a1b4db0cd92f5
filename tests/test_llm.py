"""The rows of a decoder's table, on a small random one: statistics layer by layer, made, continued, refused."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc
from experiments import llm, runner
from experiments.configs import llm as full
from experiments.language import peak, reference, text, units
from experiments.language.calibration import Calibration
from experiments.language.healing import Healing
from experiments.language.mixture import Mixture
from experiments.models import llama
from experiments.runner import describe

CONFIG = llama.Config(vocab=40, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=32)
PARAMS = llama.init(jax.random.key(0), CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 40, 400)
WINDOWS = text.windows(TOKENS, 12, 3, "first")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    return Calibration(PARAMS, CONFIG, WINDOWS, tmp_path_factory.mktemp("statistics"))


def whole(windows):
    return [(window[None, :-1],) for window in windows]


def function(params, tokens):
    return llama.apply(params, tokens, CONFIG)


def test_statistics_layer_by_layer_are_those_of_the_whole(calibration):
    found = jc.calibrate(function, PARAMS, whole(WINDOWS), statistics=["gram", "count"])

    def loss(params, window):
        return llama.losses(llama.apply(params, window[None, :-1], CONFIG), window[None]).mean()

    guide = jax.jit(lambda window: jc.trace.position_weights(loss, PARAMS, window))
    guided = jc.calibrate(
        function, PARAMS, whole(WINDOWS), statistics=["gram"], where=[guide(window) for window in WINDOWS]
    )
    for path in ("layers/0/attention/v/kernel", "layers/1/mlp/down/kernel"):
        plain = calibration.stats("plain", int(path[7]))[path]
        np.testing.assert_allclose(plain.gram, found[path].gram, rtol=1e-4, atol=1e-4)
        assert int(plain.count) == 36
        own = calibration.stats("guided", int(path[7]))[path].gram
        np.testing.assert_allclose(own, guided[path].gram, rtol=1e-3, atol=1e-3)


def test_values_count_by_the_attention_paid_to_them(calibration):
    """An error at one position of a value moves what attention gives as its weight says."""
    path = "layers/0/attention/v/kernel"
    plain, found = (calibration.stats(kind, 0)[path].gram for kind in ("plain", "attended"))
    layer, total = PARAMS["layers"][0], 0.0
    for window in WINDOWS:
        y = llama.norm(layer["attention_norm"], llama.embed(PARAMS, window[None, :-1]), CONFIG.eps)
        places = jnp.arange(12)
        q, k = (llama.dense(layer["attention"][n], y).reshape(1, 12, -1, 4) for n in "qk")
        q, k = (llama.rotate(x, places, CONFIG.theta) for x in (q, k))
        paid = [float(jnp.sum(llama.attend(q, k, CONFIG, places, places)[..., i] ** 2)) for i in range(12)]
        total += jnp.einsum("ti,tj->ij", y[0] * (np.array(paid) / np.mean(paid))[:, None], y[0])
    np.testing.assert_allclose(found, total, rtol=1e-3, atol=1e-3)
    assert not np.allclose(found, plain, rtol=0.1)


def test_perplexity_is_that_of_the_whole_function():
    found = text.perplexity(PARAMS, CONFIG, WINDOWS)
    expected = jnp.exp(llama.losses(function(PARAMS, WINDOWS[:, :-1]), WINDOWS).mean())
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    rough = text.perplexity(PARAMS, CONFIG, WINDOWS, store=jc.quantize.Int(bits=2, axis=(0, 1, 2)))
    assert rough != found and abs(rough / found - 1) < 0.1
    with pytest.raises(ValueError, match="the second half of the text has 200 tokens, expected 241"):
        text.windows(TOKENS, 12, 20, "second")


def test_rows_are_made_and_continued(tmp_path, monkeypatch):
    method = jc.quantize.GPTQ(bits=3, group_size=16, symmetric=False)
    rows = (full.Recipe("half", "16 bits"), full.Recipe("one", "GPTQ", method, sequential=True))
    config = full.Config(rows, calibration=2, calibration_length=12, evaluation=2, evaluation_length=8)
    monkeypatch.setattr(llm, "loaded", lambda model: llm.llama_files.Loaded(CONFIG, PARAMS, None))
    only = dataclasses.replace(config, only="half")
    runner.run(llm.Language(only, "tiny", None, str(tmp_path)))
    first = (tmp_path / "results.jsonl").read_text()
    shown = runner.run(llm.Language(config, "tiny", None, str(tmp_path)))
    assert (tmp_path / "results.jsonl").read_text().startswith(first)
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["half", "one"]
    found = {r["name"]: r for r in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    assert found["half"]["bits"] == 16 and found["one"]["bits"] == 3 + (16 + 3) / 16
    assert found["one"]["bytes"] < found["half"]["bytes"] and found["one"]["perplexity"] > 1
    assert (tmp_path / "table.md").exists() and (tmp_path / "pareto.png").exists()


def test_stages_are_measured_and_layers_let_go(tmp_path, monkeypatch):
    held = {**PARAMS, "layers": list(PARAMS["layers"])}
    monkeypatch.setattr(llm, "loaded", lambda model: llm.llama_files.Loaded(CONFIG, held, None))
    method = jc.quantize.GPTQ(bits=3, group_size=16, symmetric=False)
    config, recipe = full.Config((), calibration=2, calibration_length=12), full.Recipe("one", "GPTQ", method)
    rows, dense = peak.measured("tiny", None, config, recipe, tmp_path)
    assert [r["stage"] for r in rows] == ["load", "statistics", "compress", "save"]
    assert dense == sum(x.nbytes for x in jax.tree.leaves(PARAMS)) and held["layers"] == [None, None]
    assert len(jc.load(tmp_path / "layers.jc")) == 2 and "float32 model" in peak.table(rows, dense)


def test_units_and_layers_are_cut_to_half_of_the_multiply_adds(calibration):
    size = sum(x.size for layer in PARAMS["layers"] for x in jax.tree.leaves(layer))
    for cut in (units.Cut("units"), units.Cut("units", by="chance"), units.Cut("layers")):
        layers = cut(calibration)
        assert 0.4 < sum(x.size for layer in layers for x in jax.tree.leaves(layer)) / size < 0.6
        assert text.perplexity({**PARAMS, "layers": layers}, CONFIG, WINDOWS) > 1
    score, chance = (units.Cut("units", by=by)(calibration)[0]["mlp"]["down"]["kernel"] for by in ("score", "chance"))
    assert not np.array_equal(score, chance)


@pytest.mark.parametrize("cut", [False, True])
def test_healing_learns_from_the_dense_model_and_moves_nothing_else(calibration, cut):
    own = [units.Cut("units")(calibration)[0], PARAMS["layers"][1]] if cut else ()  # of two shapes
    layers = calibration.compress(((".*/kernel", jc.quantize.Int(bits=2)), (".*", full.HALF)), layers=own)
    healing = Healing(steps=15, rank=2, length=16, windows=4)
    healed = healing(PARAMS, layers, CONFIG, TOKENS, 0)
    goal = jax.nn.softmax(function(PARAMS, WINDOWS))

    def apart(layers):
        found = jax.nn.log_softmax(function({**PARAMS, "layers": jc.materialize(layers)}, WINDOWS))
        return float(-jnp.mean(jnp.sum(goal * found, -1)))

    assert apart(healed) < apart(layers)
    before, after = layers[1]["mlp"]["up"]["kernel"], healed[1]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(after.terms[0].codes, before.codes)
    assert after.terms[1].u.dtype == jnp.float16


def test_every_row_of_the_config_has_rules_and_a_name_of_its_own():
    config = full.get_config()
    names = [r.name for r in config.recipes]
    assert len(set(names)) == len(names) > 30
    shapes = jax.eval_shape(lambda: llama.init(jax.random.key(0), llama.Config.smollm2_135m()))
    for recipe in config.recipes:
        part = {"layers": {"0": shapes["layers"][0]}}
        assert len(jc.plan(part, recipe.rules())) == 9 and describe(recipe)["name"]


def test_bits_are_mixed_at_the_bytes_of_three(calibration):
    methods = tuple(jc.quantize.Int(bits=bits, group_size=16, symmetric=False) for bits in (2, 3, 4))
    found = dict(Mixture(methods, 1, length=12)(calibration, "plain"))
    assert len(found) == 14 and len({method.bits for method in found.values()}) > 1

    def size(rules):
        return jc.nbits(calibration.compress((*rules, (".*", full.HALF))))

    assert size(tuple(found.items())) <= size(((full.KERNEL, methods[1]),))


def test_errors_beside_published_code_are_those_of_outputs():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(20, 6)), rng.normal(size=(6, 3))
    made = np.round(w)
    expected = np.sum((x @ (made - w)) ** 2) / np.sum((x @ w) ** 2)
    np.testing.assert_allclose(reference.error(made, w, x.T @ x), expected)
    row = {"matrix": "layers/0/mlp/up/kernel", "setting": "50%", "free": 0.5, "theirs": 0.1, "ours": 0.1}
    shown = reference.table([row, row | {"matrix": "layers/1/mlp/up/kernel", "theirs": 0.4, "ours": 0.1}])
    assert "| 50% | mlp/up | 0.5000 | 0.2000 | 0.1000 | 2.000 |" in shown
    with pytest.raises(ValueError, match="expected the published code, none"):
        reference.module(pathlib.Path("nowhere"), "none")


def test_what_is_missing_is_told_in_one_line(tmp_path, capsys):
    assert llm.main(["--model", str(tmp_path / "none.gguf")]) == 2
    assert "none.gguf: no such file or folder" in capsys.readouterr().err
    assert llm.main(["--model", "tiny", "--data_dir", str(tmp_path), "--workdir", str(tmp_path)]) == 2
    assert "wikitext2_valid.txt: no such file" in capsys.readouterr().err
