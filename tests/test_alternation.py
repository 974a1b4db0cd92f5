"""The comparison of learning-compression with compressing first, in a short run on the digits."""

import json

import pytest

from experiments import alternation


def test_both_ways_take_equal_bytes_and_the_table_has_what_each_seed_gains(tmp_path, capsys):
    flags = ["--networks=lenet_300_100", "--epochs=4", "--parts=0.5", "--seeds=2", f"--workdir={tmp_path}"]
    assert alternation.main(flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * (1 + 2 * len(alternation.METHODS) + len(alternation.OF_MASKS))
    for seed in (0, 1):
        dense = next(row for row in rows if row["seed"] == seed and row["method"] == "dense")
        for method in alternation.METHODS:
            first, *others = (row for row in rows if (row["seed"], row["method"]) == (seed, method))
            for other in others:
                # Masks of as many weights lie elsewhere.
                assert first["bits"] == pytest.approx(other["bits"], rel=1e-2 if "weights" in method else 1e-3)
                assert other["bits"] < dense["bits"] / 10
            assert len({row["way"] for row in (first, *others)}) == 1 + len(others)
    table = (tmp_path / "table.md").read_text()
    assert table.count("of 2 |") == len(alternation.METHODS)
    (tmp_path / "table.md").unlink()
    assert alternation.main(flags) == 0
    assert (tmp_path / "table.md").read_text() == table
    assert alternation.main(["--networks=lenet_300_100,cnn", *flags[1:2], f"--workdir={tmp_path / 'other'}"]) == 2
    assert "--epochs=4: expected a number for each of lenet_300_100,cnn" in capsys.readouterr().err
