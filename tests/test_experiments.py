"""The main job on tiny configs: end to end, continued after a signal, evaluated from its files, refused when wrong."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jcompress as jc
from experiments import compress, cost, data, evaluate, lab, models, runner, tables, workdir
from experiments.configs import mnist, text

REPOSITORY = Path(__file__).parent.parent
SHARED = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
}
OPTIONS = {"cwd": REPOSITORY, "text": True, "env": {**os.environ, **SHARED}}

TINY = """
from experiments.compress import Config, deep_compression, int8, staged

def get_config():
    ways = tuple(map(staged, (int8, deep_compression)))
    return Config(name="tiny", models=("lenet_300_100",), ways=ways, seeds=1, epochs=3.0, finetune_epochs=2.0)
"""


def tiny(**changes):
    scope = {}
    exec(TINY, scope)
    return dataclasses.replace(scope["get_config"](), **changes)


def experiment(config, folder, data_dir=None):
    return compress.Compression(config, data_dir, str(folder), runner.Signals())


def run(config, folder, overwrite=False):
    return runner.run(experiment(config, folder), overwrite)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from beginning to end."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, run(tiny(), workdir)


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


def training(checkpoint, plan):
    return checkpoint.exists() and jc.io.inspect(checkpoint)["metadata"]["plan"] == plan


def same_but_for_time(rows):
    return [{k: v for k, v in row.items() if k not in ("latency", "seconds")} for row in rows]


class TestMainJob:
    def test_writes_everything(self, finished):
        workdir, printed = finished
        assert [row["plan"] for row in rows_of(workdir)] == ["dense", "baseline", "int8", "deep_compression"]
        shown = (workdir / "table.txt").read_text()
        assert shown in printed + "\n" and shown.count("not accelerated") == 2
        assert (workdir / "table.md").read_text().count("| lenet_300_100 |") == 4
        assert (workdir / "pareto.png").read_bytes()[:4] == b"\x89PNG"
        record = json.loads((workdir / "record.json").read_text())
        assert record["finished"] and len(record["summary"]) == 4
        assert record["environment"]["versions"]["jax"] == jax.__version__
        ramp = record["setting"]["ways"]["lenet_300_100 deep_compression"][0]["rules"][0][1]["sparsity"]["schedule"]
        assert ramp[0] == 0 and ramp[-1] == compress.SPARSITY

    def test_bytes_are_those_on_disk(self, finished):
        workdir, _ = finished
        for row in rows_of(workdir):
            path = workdir / row["file"]
            assert row["bytes"] == path.stat().st_size
            assert row["ratio"] == (workdir / rows_of(workdir)[0]["file"]).stat().st_size / row["bytes"]
            assert 0 <= row["bytes"] - jc.nbits(jc.load(path)) / 8 < 2000

    def test_learns(self, finished):
        dense = rows_of(finished[0])[0]
        assert dense["accuracy"] == dense["correct"] / dense["total"] > 0.8

    def test_deep_compression_is_what_it_says(self, finished):
        tree = jc.load(finished[0] / rows_of(finished[0])[3]["file"])
        kernels = [node for path, node in jc.paths(tree) if path.endswith("kernel")]
        kept = sum(int(node.mask.sum()) for node in kernels)
        size = sum(node.mask.size for node in kernels)
        assert kept == size - round(compress.SPARSITY * size)
        for node in kernels:
            assert len(np.unique(node.materialize()[node.mask])) <= 16
            assert node.values.codebook.values.dtype == np.float16

    def test_command_evaluates_each_file_to_the_same(self, finished, capsys):
        workdir, _ = finished
        for row in rows_of(workdir):
            _, score = evaluate.evaluate(workdir / row["file"])
            assert (score.correct, score.total) == (row["correct"], row["total"])

    def test_done_is_not_done_again(self, finished):
        workdir, _ = finished
        before, files = (workdir / "results.jsonl").read_bytes(), sorted((workdir / "models").iterdir())
        times = [path.stat().st_mtime_ns for path in files]
        run(tiny(), workdir)
        assert (workdir / "results.jsonl").read_bytes() == before
        assert [path.stat().st_mtime_ns for path in files] == times

    def test_other_config_is_refused(self, finished):
        with pytest.raises(ValueError, match=r"another setting \(config.epochs: 3.0 -> 4.0.*--overwrite"):
            run(tiny(epochs=4.0), finished[0])

    def test_other_plan_of_the_same_name_is_refused(self, finished):
        def int8(params, steps):
            return [compress.Stage([(".*/kernel", jc.quantize.Int(bits=7))])]

        with pytest.raises(ValueError, match=r"int8.*\.bits: 8 -> 7"):
            run(tiny(ways=(compress.staged(int8),)), finished[0])

    def test_ways_and_seeds_may_be_added(self, finished, tmp_path):
        """An experiment that wants more of the same takes the rows that are there."""
        folder = shutil.copytree(finished[0], tmp_path / "run")
        more = experiment(tiny(ways=(compress.staged(compress.int4),), seeds=2), folder)
        workdir.Record(folder, more.setting)
        known = json.loads((folder / "record.json").read_text())["setting"]["ways"]
        assert known.keys() == {f"lenet_300_100 {name}" for name in ("int8", "deep_compression", "int4")}

    def test_overwrite_spares_other_files(self, tmp_path):
        (tmp_path / "mine.txt").write_text("x")
        workdir.Record(tmp_path, experiment(tiny(), tmp_path).setting)
        workdir.Record(tmp_path, experiment(tiny(epochs=4.0), tmp_path).setting, overwrite=True)
        assert (tmp_path / "mine.txt").exists()

    def test_what_trains_alike_is_compiled_once(self, tmp_path):
        """The nets with masks share a step, and gradual pruning serves the first part of deep compression."""
        ways = tuple(map(compress.staged, (compress.magnitude, compress.random, compress.gradual)))
        job = experiment(tiny(ways=ways), tmp_path).jobs["lenet_300_100"]
        shared = [job.programs(f)[0] for f in (compress.gradual, compress.deep_compression)]
        assert shared[0].compiled is shared[1].compiled
        data, key = job.load(0), jax.random.key(0)
        for stages in (compress.magnitude, compress.random):
            program = job.programs(stages)[0]
            state, held = program.begin(job.start(0), key)
            x, y = jax.numpy.asarray(data.train.x), jax.numpy.asarray(data.train.y)
            program.step(state, held, program.pace, x, y, np.arange(64))
        assert job.once("nodes", None)._cache_size() == 1


class StopAt(workdir.Checkpoint):
    """Receives a signal at one step of one stage."""

    def __init__(self, path, stage, step):
        super().__init__(path, runner.Signals())
        self.at = (stage, step)

    def after(self, where, start):
        inner = super().after(where, start)

        def after(state, done):
            if (where["stage"], done) == self.at:
                self.signals.received = signal.SIGTERM
            inner(state, done)

        return after


class TestContinuing:
    @pytest.mark.parametrize(
        ("plan", "stage"), [("dense", 0), ("deep_compression", 0), ("deep_compression", 1), ("int4", 0), ("random", 0)]
    )
    def test_bit_for_bit(self, tmp_path, plan, stage):
        known = {way.name: way for way in (compress.DENSE, *compress.Config().ways)}

        def fresh(checkpoint=None):
            job = compress.Job(
                "lenet_300_100", tiny(), lambda s: data.load("digits", seed=s), tmp_path, runner.Signals()
            )
            job.checkpoint = checkpoint or job.checkpoint
            return job

        job, path = fresh(), tmp_path / "b.jc"
        (tmp_path / "models").mkdir()
        jc.io.save(job.path(1, "dense"), job.start(1))
        whole = known[plan].make(job, 1)
        with pytest.raises(runner.Interrupted):
            known[plan].make(fresh(StopAt(path, stage, 5)), 1)
        assert jc.io.inspect(path)["metadata"] == {
            "model": "lenet_300_100", "seed": 1, "plan": plan, "stage": stage, "step": 5,
        }  # fmt: skip
        continued = known[plan].make(fresh(workdir.Checkpoint(path, runner.Signals())), 1)
        jax.tree.map(np.testing.assert_array_equal, whole, continued)

    def test_checkpoint_of_another_measurement_is_not_used(self, tmp_path):
        checkpoint = workdir.Checkpoint(tmp_path / "c.jc", runner.Signals(), seconds=0)
        state = compress.State({"w": np.ones(2)}, (), np.int32(1))
        checkpoint.after({"model": "a", "seed": 0, "plan": "p", "stage": 0}, {})(state, 1)
        assert checkpoint.stage({"model": "a", "seed": 1, "plan": "p"}) is None
        assert checkpoint.stage({"model": "a", "seed": 0, "plan": "p"}) is not None

    def test_command_stopped_by_a_signal(self, finished, tmp_path):
        """Stopped in training, continued by the same command: the results of the unbroken run."""
        (tmp_path / "tiny.py").write_text(TINY)
        workdir, checkpoint = tmp_path / "run", tmp_path / "run/checkpoint/state.jc"
        program = [sys.executable, "-m", "experiments.compress", f"--config={tmp_path}/tiny.py"]
        program += [f"--workdir={workdir}", "--config.checkpoint_seconds=0.0"]
        for _ in range(3):  # on a busy machine the run may end before the signal is sent
            shutil.rmtree(workdir, ignore_errors=True)
            with subprocess.Popen(program, **OPTIONS, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                while process.poll() is None and not training(checkpoint, "deep_compression"):
                    time.sleep(0.002)
                process.send_signal(signal.SIGTERM)
                _, complaint = process.communicate()
            if process.returncode != 0:
                break
        assert process.returncode == 143
        assert f"to continue: python -m experiments.compress --config={tmp_path}/tiny.py" in complaint
        assert "Traceback" not in complaint and training(checkpoint, "deep_compression")
        assert len(rows_of(workdir)) == 3
        assert subprocess.run(program, **OPTIONS, capture_output=True).returncode == 0
        assert same_but_for_time(rows_of(workdir)) == same_but_for_time(rows_of(finished[0]))
        for path in (finished[0] / "models").iterdir():
            assert path.read_bytes() == (workdir / "models" / path.name).read_bytes()
        assert len(json.loads((workdir / "record.json").read_text())["runs"]) == 2
        assert not checkpoint.exists()


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "data_dir", "message"),
        [
            ({"data": "digit"}, None, "data 'digit' is unknown; use one of digits"),
            ({"only": "int8,int9"}, None, "config.only: 'int9' is unknown; use some of int8,deep_compression"),
            ({"data": "mnist", "data_options": {}}, None, "data 'mnist' needs its files; pass --data_dir"),
            ({"data": "mnist", "data_options": {}}, "nowhere", "nowhere: no such folder"),
            ({"data": "mnist", "data_options": {}}, str(REPOSITORY), "found no MNIST files; expected t10k-images"),
            ({"seeds": 0}, None, "config.seeds=0 must be positive"),
            ({"models": ("lenet",)}, None, "model 'lenet' is unknown; use one of lenet_300_100"),
            ({"models": ("transformer",)}, None, "model 'transformer' reads text, but the data are images"),
            ({"model_options": {"cnn": {"depth": 3}}, "models": ("cnn",)}, None, "model 'cnn': got an unexpected"),
            ({"data_options": {"vall": 0.1}}, None, "config.data_options: 'vall' is unknown"),
        ],
    )
    def test_one_line(self, tmp_path, capsys, changes, data_dir, message):
        config = tiny(**changes)
        assert runner.main(lambda signals: experiment(config, tmp_path / "w", data_dir)) == 2
        complaint = capsys.readouterr().err
        assert complaint.startswith("error: ") and message in complaint and complaint.count("\n") == 1
        assert not (tmp_path / "w").exists()

    def test_a_rule_that_matches_nothing(self, tmp_path, capsys):
        def typo(params, steps):
            return [compress.Stage([(".*/kernal", jc.quantize.Int(bits=8))])]

        assert runner.main(lambda signals: experiment(tiny(ways=(compress.staged(typo),)), tmp_path)) == 2
        assert "lenet_300_100, way typo: rule 0 '.*/kernal' matches no parameter" in capsys.readouterr().err

    def test_command_takes_the_config_of_the_data(self, capsys):
        """Both the config of the data and an override, in a run that stops before it trains."""
        assert compress.main(["--config.data=mnist", "--config.models=lenet"]) == 2
        assert capsys.readouterr().err.startswith("error: data 'mnist' needs its files")
        assert compress.config_of("mnist") == mnist.get_config()

    def test_evaluate_needs_a_file_of_an_experiment(self, tmp_path):
        jc.save(tmp_path / "x.jc", {"w": np.ones(2)}, metadata={"data": "digits"})
        with pytest.raises(ValueError, match="says nothing of its model, seed"):
            evaluate.evaluate(tmp_path / "x.jc")


class TestCost:
    def test_counts_by_hand(self):
        """A dense net multiplies each weight once; a convolution at each position."""
        x = np.zeros((2, 28, 28, 1), np.float32)
        net = models.build("lenet_300_100", 10)
        params = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
        _, kernels = cost.multiply_adds(net, params, x)
        assert sum(kernels.values()) == 784 * 300 + 300 * 100 + 100 * 10
        net = models.build("lenet5", 10)
        params = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
        total, kernels = cost.multiply_adds(net, params, x)
        expected = {"conv_0": 24**2 * 25 * 20, "conv_1": 8**2 * 500 * 50, "dense_0": 800 * 500, "head": 5000}
        assert kernels == {f"{name}/kernel": n for name, n in expected.items()}
        assert sum(kernels.values()) <= total <= 1.05 * sum(kernels.values())
        assert sum(x.size for x in jax.tree.leaves(params)) == 431_080

    def test_of_compressed(self):
        w, dense = np.ones((20, 10), np.float32), (230.0, {"d/kernel": 200.0})
        half, quarter = (np.arange(200).reshape(20, 10) % n == 0 for n in (2, 4))
        masked, factors = jc.formats.Masked(w, quarter), jc.formats.LowRank(w[:, :2], w[:2])
        pruned = jc.formats.LowRank(jc.formats.Masked(w[:, :2], half[:, :2]), w[:2])
        codes = jc.formats.Quantized(w.astype(np.int8), w[:1], bits=4)
        for node, expected in [
            (w, 200),
            (masked, 50),
            (factors, 2 * 20 + 2 * 10),
            (pruned, 20 + 2 * 10),
            (codes, 200),
            (jc.formats.Sum((masked, factors)), 110),
        ]:
            assert cost.compressed_multiply_adds({"d": {"kernel": node}}, dense) == pytest.approx(30 + expected)


class TestTable:
    def test_mean_and_deviation(self):
        shared = {"model": "m", "bits_per_byte": None, "bytes": 10, "ratio": 2.0, "multiply_adds": 5, "latency": None}
        results = [
            {**shared, "seed": s, "plan": plan, "accuracy": a}
            for plan, values in {"baseline": (0.90, 0.94), "p": (0.80, 0.94)}.items()
            for s, a in enumerate(values)
        ]
        _, row = tables.summarize(results)
        assert row["mean"] == pytest.approx(87) and row["std"] == pytest.approx(np.std([80, 94], ddof=1))
        assert row["change"] == pytest.approx(-5)


class TestText:
    def test_loss_falls(self, tmp_path):
        (tmp_path / "poem.txt").write_bytes(b"a rose is a rose is a rose is a rose. " * 400)
        found = data.load("text", str(tmp_path), length=32)
        net = models.build("transformer", found.classes, {"width": 32, "layers": 1, "heads": 2, "longest": 32})
        options = {"transformer": {"width": 32, "layers": 1, "heads": 2, "longest": 32}}
        config = dataclasses.replace(text.get_config(), model_options=options, epochs=4.0)
        job = compress.Job("transformer", config, lambda seed: found, tmp_path, runner.Signals())
        score = lab.make_evaluate(models.apply(net))
        before = score(job.start(0), found.test)
        after = score(compress.DENSE.make(job, 0), found.test)
        assert before.bits > 7 and after.bits < 3

    def test_sees_no_future(self):
        net = models.build("transformer", 256, {"width": 16, "layers": 2, "heads": 2})
        x = np.arange(12, dtype=np.uint8)[None]
        params = models.init(net, x, jax.random.key(0))
        changed = x.copy()
        changed[0, 8:] = 200
        a, b = (models.apply(net)(params, v) for v in (x, changed))
        np.testing.assert_array_equal(a[0, :8], b[0, :8])
        assert not np.allclose(a[0, 8:], b[0, 8:])

    def test_plans_fit_the_model(self):
        config = text.get_config()
        split = data.Split(np.zeros((64, 128), np.uint8), np.zeros((64, 128), np.int32))
        found = data.Data("text", "text", 256, split, split, split)
        job = compress.Job("transformer", config, lambda seed: found, REPOSITORY, runner.Signals())
        assert all(way.told(job)[0]["name"] == "Stage" for way in config.ways)


def test_every_way_of_the_main_job_can_be_written_down():
    params = {"layer": {"kernel": np.zeros((64, 32), np.float32)}, "head": {"kernel": np.zeros((32, 10), np.float32)}}
    for stages in (compress.int8, compress.int4, compress.svd, compress.kmeans, compress.gradual, compress.random):
        told = json.loads(json.dumps(runner.describe(stages(params, 100), 100)))
        assert told[0]["name"] == "Stage"
        if stages is compress.random:
            assert told[0]["rules"][0][1]["score"] == "random"
