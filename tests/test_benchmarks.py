"""The benchmark and claim scripts run at small sizes and write what they say. No timing is asserted."""

import json
import math

import numpy as np
import pytest

from experiments.benchmarks import (
    codebooks,
    coder,
    factorize,
    gptq,
    mask_update,
    quantize,
    scale,
    timing,
    train_step,
    two_bits,
    vmap_levels,
)
from experiments.claims import lenet

COMMON = ["--pairs", "2", "--out"]


def rows(path):
    record = json.loads(path.read_text())
    assert record["environment"]["jax"]
    assert all(math.isfinite(r["ratio"]) and r["ratio"] > 0 and r["pairs"] == 2 for r in record["rows"])
    return record["rows"]


def test_mask_update_writes_its_rows(tmp_path):
    path = tmp_path / "mask.json"
    mask_update.main(["--sizes", "4000", "--calls", "1", "--sparsity", "0.75", *COMMON, str(path)])
    found = rows(path)
    assert len(found) == 8
    assert {r["extra"]["kept"] for r in found if "argsort" in r["name"]} == {1000}


def test_train_step_writes_its_rows(tmp_path):
    path = tmp_path / "step.json"
    small = ["--widths", "8", "16", "4", "--batch", "4", "--width", "12", "--depth", "1", "--length", "8"]
    train_step.main([*small, "--texts", "2", "--heads", "3", "--only", "project", *COMMON, str(path)])
    assert {r["name"].split()[0] for r in rows(path)} == {"MLP", "transformer"}


def test_gptq_writes_its_rows_and_gives_the_codes_of_the_loop(tmp_path):
    path = tmp_path / "gptq.json"
    gptq.main(["--width", "16", "--layers", "1", "--group-size", "8", *COMMON, str(path)])
    found = rows(path)
    assert len(found) == 3
    assert all(r["extra"]["codes_agree"] in (None, 1.0) for r in found)


@pytest.mark.parametrize("only", ["CP, 3 small", "4-bit"])
def test_factorize_writes_its_rows(tmp_path, only):
    path = tmp_path / "factorize.json"
    small = ["--size", "64", "--channels", "8", "--rank", "3", "--modes", "2", "4", "--sweeps", "2", "--only", only]
    factorize.main([*small, *COMMON, str(path)])
    assert {r["left"] for r in rows(path)} <= {"CP", "accelerate"}


def test_codebooks_write_their_rows(tmp_path):
    path = tmp_path / "codebooks.json"
    small = ["--inputs", "64", "--outputs", "256", "--batch", "2", "--words", "8", "--soft", "50", "--rounds", "2", "4"]
    codebooks.main([*small, "--only", "words of 8, 2", *COMMON, str(path)])
    assert all(r["extra"]["how"].startswith("partial") and r["extra"]["difference"] < 1e-6 for r in rows(path))
    needed = json.loads(path.read_text())["settings"]["backward_bytes"]
    assert needed["implicit"]["2"] == needed["implicit"]["4"] < needed["unrolled"]["4"]


def test_vmap_levels_writes_its_rows(tmp_path):
    path = tmp_path / "levels.json"
    vmap_levels.main(["--sizes", "2000", "--levels", "3", *COMMON, str(path)])
    assert len(rows(path)) == 2


def test_scale_writes_its_rows(tmp_path):
    path, small = tmp_path / "scale.json", ["--width", "32", "--depth", "1", "--layers", "2", "--batch", "8"]
    some = ["--parts", "steps", "leaves", "--only", "fsdp 8: project, no"]
    scale.main([*small, "--length", "8", "--leaves", "40", *some, *COMMON, str(path)])
    assert len(rows(path)) == 1
    found = json.loads(path.read_text())["settings"]["seconds_of_leaves"]
    assert [row["what"] for row in found] == ["plan", "compress", "nbits"]


def test_quantize_writes_its_rows(tmp_path):
    path = tmp_path / "quantize.json"
    quantize.main(["--width", "66", "--depth", "1", "--only", "int8", *COMMON, str(path)])
    assert "jcompress" in {r["right"] for r in rows(path)}


def test_the_coder_writes_its_rows(tmp_path):
    path = tmp_path / "coder.json"
    assert coder.main(["--side", "128", "--repeats", "1", "--out", str(path)]) == 0
    found = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert len(found) == 3 and all(0 <= row["above"] < 0.01 for row in found.values())
    assert found["bfloat16 weights"]["of stored"] < 0.68


def test_two_bits_writes_its_rows(tmp_path):
    path = tmp_path / "two_bits.json"
    assert two_bits.main(["--seeds", "1", "--size", "32", "--memories", "6", "--out", str(path)]) == 0
    found = {(row["what"], row["code"]): row for row in json.loads(path.read_text())["rows"]}
    assert 0.0625 < found["Gaussian", "E8P"]["error"] < found["Gaussian", "four values"]["error"] < 0.12
    assert found["outputs", "E8P"]["error"] < found["outputs", "GPTQ, clipped"]["error"]


def test_a_ratio_is_the_median_of_paired_ratios():
    found = timing.row("x", ("a", np.array([1.0, 2.0, 4.0])), ("b", np.array([3.0, 4.0, 4.0])), "<= 2")
    assert found.ratio == 2.0 and found.met
    assert timing.is_met(1.9, ">= 2") is False


def claimed(drops, ratio):
    claim = lenet.Claim(25, 0.5, len(drops), lenet.CLAIMS["digits", "lenet_300_100"].recipe)
    made = [{"dense": 1, "control": 0.9, "compressed": 0.9 - d / 100, "ratio": ratio, "bytes": 1} for d in drops]
    return lenet.summary(claim, made)


def test_a_claim_counts_the_standard_error():
    assert claimed([0.1, 0.1, 0.1, 0.1], 26)["holds"]
    assert not claimed([0.1, 0.1, 0.1, 0.1], 24)["holds"]
    found = claimed([-1.0, 1.0, -1.0, 1.0], 26)  # mean 0, deviation 2 / sqrt(3)
    assert found["standard_error"] == pytest.approx(1 / 3**0.5)
    assert not found["holds"]


def test_a_claim_runs_and_continues(tmp_path, capsys):
    arguments = ["--epochs", "0.05", "--random", "1", "--workdir", str(tmp_path)]
    assert lenet.main([*arguments, "--splits", "1"]) == 0
    assert lenet.main([*arguments, "--splits", "2"]) == 0
    folder = tmp_path / "digits_lenet_300_100"
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["split"] for line in lines] == [0, 1]
    record = json.loads((folder / "record.json").read_text())
    assert record["summary"]["splits"] == 2 and not record["summary"]["holds"]
    rows = [json.loads(line) for line in lines]
    assert "random" in rows[0] and "random" not in rows[1]
    assert "DOES NOT HOLD" in capsys.readouterr().out


def test_validation_never_sees_the_test_split():
    real, trial = (lenet.split("digits", 0, None, validate) for validate in (False, True))
    assert len(real.train) + len(real.test) == 1797
    assert len(trial.train) + len(trial.test) == len(real.train)


def test_a_model_without_a_claim_is_refused(capsys):
    with pytest.raises(SystemExit):
        lenet.main(["--model", "lenet5"])
    assert "there is no claim" in capsys.readouterr().err
