"""Sweeps: lanes of one program, any executor, jobs that fail or take their worker with them, a real cluster."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import sweep_jobs

import jcompress as jc
from experiments import sweep
from experiments.workdir import RunError

TINY = sweep.Config(
    methods=("magnitude", "int"),
    levels={"magnitude": (0.5, 0.9), "int": (4,)},
    seeds=2,
    epochs=1.0,
    finetune_epochs=0.2,
)


def check(folder, text):
    """What a finished sweep of the tiny config wrote."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    keys = [(row["method"], row["level"], row["seed"]) for row in rows]
    kinds = [("dense", 0.0), ("magnitude", 0.5), ("magnitude", 0.9), ("int", 4)]
    assert keys == [(*kind, seed) for kind in kinds for seed in range(2)]
    assert sorted(path.name for path in (folder / "rows").iterdir()) == [
        "dense.json",
        "int-4.json",
        "magnitude-0.5-0.9.json",
    ]
    assert (folder / "table.md").read_text().count("\n") == 2 + len(kinds) and "magnitude" in text
    assert (folder / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    with ThreadPoolExecutor(1) as executor:
        return folder, sweep.run(TINY, folder, executor)


def test_a_sweep_ends_in_rows_a_table_and_a_front(finished):
    folder, text = finished
    rows = check(folder, text)
    dense = [row for row in rows if row["method"] == "dense"]
    params = jc.load(folder / "dense.jc")
    assert params["head"]["kernel"].shape[0] == 2 and bool(
        (params["head"]["kernel"][0] != params["head"]["kernel"][1]).any()
    )
    for row in rows:
        assert row["bytes"] == row["bits"] // 8 < dense[0]["bytes"] or row["method"] == "dense"
    found = sweep.summarize(rows)
    best = max(found, key=lambda row: row["mean"])
    assert best["front"] and min(found, key=lambda row: row["bytes"])["front"]
    beaten = [a for a in found if any(b["mean"] > a["mean"] and b["bytes"] < a["bytes"] for b in found)]
    assert not any(row["front"] for row in beaten)


def test_a_finished_sweep_runs_nothing_again(finished):
    folder, text = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "rows").iterdir()}
    assert sweep.run(TINY, folder, executor=None) == text  # it is asked for nothing
    assert {path: path.stat().st_mtime_ns for path in (folder / "rows").iterdir()} == before


def test_another_setting_is_refused(finished):
    with pytest.raises(ValueError, match=r"another setting \(epochs: 1.0 -> 2.0"):
        sweep.run(sweep.dataclasses.replace(TINY, epochs=2.0), finished[0], None)


def test_lanes_are_the_networks_that_each_alone_would_be(finished):
    """Levels and seeds under one vmap start from the masks that each would have alone."""
    lanes, method = sweep.Lanes(TINY, None), sweep.METHODS["magnitude"]
    dense = jc.load(finished[0] / "dense.jc")
    begin, _ = lanes.compiled(method, (0.5, 0.9), 1)
    held = begin(*lanes.given(method, (0.5, 0.9)), dense).held
    for i, level in enumerate((0.5, 0.9)):
        for seed in range(2):
            own = jax.tree.map(lambda x, seed=seed: x[seed], dense)
            alone = jc.compress(own, jc.plan(own, sweep.magnitude(level)))
            for path, node in jc.paths(alone):
                if path.endswith("kernel"):
                    np.testing.assert_array_equal(jc.rules.leaves(held)[path].mask[i, seed], node.mask)


def work(folder, **functions):
    return {folder / f"{name}.json": call for name, call in functions.items()}


def test_a_job_that_fails_is_named_and_tried_again(tmp_path, capsys):
    names = ("works", "fails", "too")
    wanted = work(tmp_path, **{name: (sweep_jobs.counted, (str(tmp_path), name)) for name in names})
    with ThreadPoolExecutor(2) as executor:
        with pytest.raises(RunError, match="1 of 3 jobs failed, fails by ArithmeticError: no luck; the same command"):
            sweep.sweep(wanted, executor)
        assert sorted(path.stem for path in tmp_path.glob("*.json")) == ["too", "works"]
        assert [row["name"] for row in sweep.sweep(wanted, executor)] == list(names)
    calls = {name: len((tmp_path / f"{name}.calls").read_text()) for name in names}
    assert calls == {"works": 1, "fails": 2, "too": 1}
    assert "[1/1] fails" in capsys.readouterr().out


def test_a_worker_that_dies_loses_no_rows(tmp_path):
    wanted = work(tmp_path, first=(sweep_jobs.rows, ("first", 1)), dies=(sweep_jobs.dies, (str(tmp_path),)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool, pytest.raises(RunError, match="dies by BrokenProcessPool"):
        sweep.sweep(wanted, pool)
    assert json.loads((tmp_path / "first.json").read_text()) == sweep_jobs.rows("first", 1)
    with ProcessPoolExecutor(1, context) as pool:
        assert [row["value"] for row in sweep.sweep(wanted, pool)] == [1, 2]


@pytest.mark.filterwarnings("default")  # of the engine's sockets and threads
def test_two_workers_of_a_dask_cluster(tmp_path):
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    with (
        distributed.LocalCluster(**options, processes=True) as cluster,
        sweep.executor_of("dask", 2, cluster.scheduler_address, tmp_path) as executor,
    ):
        check(tmp_path, sweep.run(TINY, tmp_path, executor))
        wanted = work(tmp_path, one=(sweep_jobs.rows, ("one", 1)))
        assert sweep.sweep(wanted, executor) == sweep_jobs.rows("one", 1)


@pytest.mark.filterwarnings("default")
def test_jobs_of_submitit(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here, here.parent))))
    engine = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local")
    wanted = work(tmp_path, one=(sweep_jobs.rows, ("one", 1)), two=(sweep_jobs.rows, ("two", 2)))
    assert [row["value"] for row in sweep.sweep(wanted, engine)] == [1, 2]


def test_what_is_wrong_is_said(tmp_path, capsys):
    assert sweep.main(["--config.methods=magic", "--workdir", str(tmp_path)]) == 2
    assert "config.methods: 'magic' is unknown; use some of magnitude,random,int,kmeans" in capsys.readouterr().err
