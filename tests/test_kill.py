"""A sharded run is killed, also while it saves, and goes on bit for bit; the experiment itself, at few points."""

import json

import jax
import pytest

pytest.importorskip("grain")

from experiments import kill


def test_a_run_killed_at_random_points(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    out = tmp_path / "kill.json"
    assert kill.main(["--points", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["same_end_on_8_devices"] and found["same_file_on_8_devices"] and found["same_on_4_devices"]
    assert found["killed_within_a_save"] >= 1
    for row in found["rows"]:
        assert row["started_from"] < row["saved"] <= row["killed_at"] < found["steps"]
