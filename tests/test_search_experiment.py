"""The search for the smallest file as an experiment: its tables by hand, and a run that is killed."""

import json

import pytest

from experiments import search

ROWS = [
    {"way": "dense", "bytes": 4000, "held out": 1.0, "score": 5.0},
    {"way": "gptq2", "bytes": 250, "cost": 2000, "held out": 3.0, "score": 9.0},
    {"way": "values16", "bytes": 600, "cost": 4800, "held out": 1.5, "score": 6.0},
    {"way": "gptq4", "bytes": 500, "cost": 4000, "held out": 1.25, "score": 5.5},
    {"way": "smallest", "bytes": 400, "cost": 3200, "held out": 1.25, "score": 5.25},
    {"way": "front", "picks": [{"way": "gptq4", "bytes": 480, "cost": 3900, "held out": 1.125, "score": 5.0}]},
]


def test_tables_of_plans_and_searches():
    assert [row["way"] for row in search.uniform_front(ROWS)] == ["gptq2", "gptq4"]
    _, *lines = search.summary(ROWS)
    assert [line[0] for line in lines] == ["gptq2", "smallest", "gptq4", "values16", "dense"]
    assert lines[1] == ["smallest", "400", "10.00x", "+0.25000", "5.2500", "+0.2500"]
    assert search.beside(ROWS)[1] == ["gptq4", "500", "480", "0.25000", "0.12500", "5.5000", "5.0000"]


def test_families_that_are_none(capsys):
    for flag in ("--families=gptq3,svd", "--reference=none"):
        assert search.main([flag]) == 2
        assert "is unknown; use some of gptq2," in capsys.readouterr().err


@pytest.mark.parametrize("kills", [2])
def test_a_search_killed_at_random_points_finds_what_any_finds(tmp_path, kills):
    small = ["--steps=30", "--evaluations=18", "--families=gptq2,gptq4"]
    assert search.main([*small, f"--workdir={tmp_path / 'whole'}"]) == 0
    assert search.main([*small, f"--workdir={tmp_path / 'hurt'}", f"--kills={kills}"]) == 0
    told = json.loads((tmp_path / "hurt" / "kills.json").read_text())
    assert [x["code"] for x in told] == [-9] * kills and all(x["evaluations"] >= x["target"] > 0 for x in told)
    whole, hurt = (
        {row.pop("way"): row for row in map(json.loads, (tmp_path / x / "results.jsonl").read_text().splitlines())}
        for x in ("whole", "hurt")
    )
    assert whole.keys() == hurt.keys() == {"dense", "gptq2", "gptq4", "smallest", "front"}
    for way, row in whole.items():  # processes of other flags may differ in the last bits of a loss
        assert row.get("names") == hurt[way].get("names") and row.get("bytes") == hurt[way].get("bytes")
        assert row.get("held out", 0.0) == pytest.approx(hurt[way].get("held out", 0.0), rel=1e-5)
    best, reference = whole["smallest"], whole["gptq4"]
    assert best["bytes"] <= reference["bytes"] and best["held out"] <= reference["held out"] + 1e-5
