"""The experiment and the benchmark of quantized training run at small sizes and write what they say."""

import dataclasses
import json

import pytest

from experiments.benchmarks import qat
from experiments.quantization import training


@pytest.fixture
def small(monkeypatch):
    task = dataclasses.replace(training.TASKS["digits"], dense=2, steps=2)
    monkeypatch.setattr(training, "TASKS", {"digits": task})


def test_the_experiment_writes_its_rows_and_continues(small, tmp_path, capsys):
    for seeds in ("1", "2"):
        only = ["--only", "binary, BinaryConnect", "--workdir", str(tmp_path)]
        assert training.main(["--tasks", "digits", "--seeds", seeds, *only]) == 0
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["way"], r["seed"]) for r in lines] == [(r["way"], s) for s in (0, 1) for r in lines[:2]]
    assert len({r["rate"] for r in lines if r["way"] == lines[0]["way"]}) == 1
    for row in training.summary(lines):
        scores = [r["test"] for r in lines if r["way"] == row["way"]]
        assert row["mean"] == pytest.approx(sum(scores) / 2)
        assert row["std"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    assert "± " in capsys.readouterr().out
    assert (tmp_path / "curve.png").exists() and "± " in (tmp_path / "table.md").read_text()


def test_the_benchmark_writes_its_rows(tmp_path):
    path = tmp_path / "qat.json"
    small = ["--widths", "8", "16", "4", "--batch", "4", "--models", "mlp", "--pairs", "2", "--out", str(path)]
    qat.main(small)
    assert len(json.loads(path.read_text())["rows"]) == 3
