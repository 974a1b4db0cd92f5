"""The benchmark of sparse training runs at a small size and writes its rows. No timing is asserted."""

import json

from experiments.benchmarks import dynamic


def test_the_benchmark_writes_its_rows(tmp_path):
    path = tmp_path / "dynamic.json"
    small = ["--models", "mlp", "--widths", "8", "16", "4", "--batch", "4", "--only", "SET update", "--pairs", "2"]
    dynamic.main([*small, "--out", str(path)])
    names = [row["name"] for row in json.loads(path.read_text())["rows"]]
    assert [name.split(": ")[1] for name in names] == ["SET update"]
