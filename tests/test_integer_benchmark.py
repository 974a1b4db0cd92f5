"""The benchmark of integer execution runs at small sizes and writes what it says. No timing is asserted."""

import json
import math

from experiments.benchmarks import integer


def test_it_writes_its_rows(tmp_path):
    path = tmp_path / "integer.json"
    small = [
        "--widths",
        "8",
        "16",
        "4",
        "--batch",
        "4",
        "--width",
        "12",
        "--depth",
        "1",
        "--length",
        "8",
        "--heads",
        "3",
    ]
    integer.main([*small, "--texts", "2", "--pairs", "2", "--out", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 10
    assert all(math.isfinite(r["ratio"]) and r["ratio"] > 0 for r in rows)
    for row in rows:
        is_integer = "weights only" not in row["name"]
        assert row["extra"]["integer_products"] == (row["extra"]["products"] if is_integer else 0)
        assert 0 < row["extra"]["relative_error"] < 0.1
