"""Small networks beside large ones made small: a short run, and how the table chooses."""

import json

import numpy as np

from experiments import smaller


def test_each_way_is_stored_scored_and_continued(tmp_path, monkeypatch, capsys):
    letters = np.random.default_rng(0).choice(list("abcd \n"), 6000)
    (tmp_path / "tinyshakespeare.txt").write_text("".join(letters))
    monkeypatch.setattr(smaller, "WAYS", {name: smaller.WAYS[name] for name in ("8 bits", "2 bits", "half zeros")})
    sizes = ["widths=8,16", "layers=1", "length=16", "steps=10", "finetuning=2", "batch_size=8", "seeds=1"]
    flags = [*(f"--config.{x}" for x in sizes), f"--data_dir={tmp_path}", f"--workdir={tmp_path / 'run'}"]
    assert smaller.main(flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert [(row["width"], row["way"]) for row in rows[:3]] == [(8, "8 bits"), (8, "2 bits"), (8, "half zeros")]
    eight, two = rows[3]["bytes"], rows[4]["bytes"]
    assert two < eight / 2 and all(0 < row["test_bits"] < 9 for row in rows)
    assert smaller.main(flags) == 0 and "6 rows, 6 of them there" in capsys.readouterr().out
    assert smaller.main([*flags, "--config.data=mnist"]) == 2


def test_the_table_chooses_on_held_out_text_within_the_limit(tmp_path):
    sizes = {(8, "8 bits"): (50, 3.0), (16, "8 bits"): (150, 2.0), (8, "2 bits"): (20, 3.5), (16, "2 bits"): (60, 2.5)}
    rows = [
        {"seed": seed, "width": w, "way": way, "bytes": 1024 * size, "val_bits": bits + seed, "test_bits": 9 - bits}
        for seed in (0, 1) for (w, way), (size, bits) in sizes.items()
    ]  # fmt: skip
    assert [row["width"] for row in smaller.best(rows, "8 bits", 64 * 1024)] == [8, 8]
    assert [row["width"] for row in smaller.best(rows, "8 bits", 256 * 1024)] == [16, 16]
    assert smaller.best(rows, "8 bits", 1024) == []
    lines = smaller.publish(rows, tmp_path / "table.md").splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["2 bits", "8 bits", "8 bits", "2 bits"]
