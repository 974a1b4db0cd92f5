"""A scripted training run on any number of devices and hosts, under any plan, that may stop at any time.

    python -m experiments.train --config=experiments/configs/train_decoder.py:tiny --workdir=runs/decoder
    python -m experiments.train --config=experiments/configs/train_resnet.py --data_dir=<folder of CIFAR-10>

Fields of the config are flags, such as ``--config.mesh.tensor=2`` or ``--config.compress.sparsity=0.9``. On a cluster
the same command runs once on every host, with ``--distributed``; ``experiments/launch`` has recipes for TPU pods and
SLURM. It writes checkpoints, ``metrics.jsonl``, ``record.json`` and, at the end, the compressed parameters ``model.jc``
to the workdir. Stopped by a signal it saves first; killed, it goes on from the last checkpoint by the same command, on
the same or another number of devices.

Expect of the tiny decoder on synthetic bytes, 80 percent pruned, a test loss of 0.90 nats after 300 steps (5.6 at the
start), 91 percent of the bytes right, and 134 kB stored of 362 kB dense; see ``docs/guides/scale.md``.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

import jcompress as jc
from experiments import data as datasets
from experiments import runner
from experiments.environment import command
from experiments.training import meshes, pipeline, steps, tasks
from experiments.training.writers import Clock, Metrics
from experiments.workdir import Lock, Record, RunError

PyTree = Any
MACHINE = ("name", "mesh", "sharding", "checkpoint", "log_every", "tensorboard")
"""Fields of a config that do not decide the results, but for rounding: a run may go on with others."""


class Result(NamedTuple):
    """What a run gives: the state after the last step, the compressed parameters, and how well they do."""

    state: steps.State
    tree: PyTree
    scores: dict[str, float]


class Parts:
    """What a config says before there are data: a task, a plan, and where every array of the state lies.

    Args:
      config: see ``experiments/configs/train_decoder.py``.
      mesh: of devices, or an abstract one.
      classes: of the data, where known.

    Raises:
      ValueError: for anything wrong with the config.
    """

    def __init__(self, config: ConfigDict, mesh: Any, classes: int | None = None) -> None:
        self.config, self.mesh = config, mesh
        self.task = tasks.build(config.model, classes)
        params, _ = jax.eval_shape(self.task.init, jax.random.key(0))
        spread = meshes.of_params(params, config.sharding, mesh)
        meshes.check_batch(config.batch_size, config.accumulate, mesh)
        known = meshes.abstract(params, jc.rules.rebuild(params, spread)) if isinstance(mesh, Mesh) else params
        self.plan = jc.plan(known, config.compress.rules(config))
        optimizer, chosen = steps.make_optimizer(config.optimizer, config.steps), config.compress
        self.trainer = steps.Trainer(self.task, self.plan, chosen.how, optimizer, chosen.every, config.seed)
        self.shapes = jax.eval_shape(self.trainer.init)
        self.shardings = meshes.of_state(self.shapes, spread, jc.rules.leaves(params), mesh)

    def __str__(self) -> str:
        trainer, last = self.trainer, self.config.steps
        params, _ = jax.eval_shape(self.task.init, jax.random.key(0))
        small = jax.eval_shape(lambda x: jc.compress(x, self.plan, step=last, key=trainer.key), params)
        count, stored = sum(x.size for x in jax.tree.leaves(params)), jc.nbits(small) / 8
        held = meshes.bytes_on_a_device(self.shapes, self.shardings)
        sizes = " x ".join(f"{name}={size}" for name, size in self.mesh.shape.items())
        return (
            f"{count:,} parameters, {4 * count / 2**20:,.1f} MiB; compressed {stored / 2**20:,.1f} MiB\n"
            f"mesh {sizes}: {held / 2**20:,.1f} MiB of parameters, moments and what is held a device, "
            f"{self.config.batch_size // meshes.examples_of(self.mesh)} examples of a step"
        )


class Run(Parts):
    """All parts of a run, checked against one another before anything is computed.

    Args:
      config: see ``experiments/configs/train_decoder.py``.
      workdir: where it writes; all processes must see one folder.
      data_dir: the folder of the data's files.

    Raises:
      ValueError: for anything wrong with the config or the data.
    """

    def __init__(self, config: ConfigDict, workdir: str | Path, data_dir: str | None = None) -> None:
        self.workdir = Path(workdir)
        self.data = datasets.of(config.data.name, data_dir, dict(config.data.get("options", {})))
        super().__init__(config, meshes.make_mesh(config.mesh), self.data.classes)
        if self.task.kind != self.data.kind:
            raise ValueError(
                f"config.model.name: {config.model.name!r} reads {self.task.kind} data, but config.data.name "
                f"{config.data.name!r} is {self.data.kind}"
            )
        self.batches = pipeline.Batches(
            pipeline.Source(self.data.train),
            config.batch_size,
            self.mesh,
            parts=config.accumulate,
            seed=config.seed,
            change=self.task.change if config.data.get("augment", True) else None,
        )
        self.step = jax.jit(self.trainer.step, donate_argnums=0, out_shardings=(self.shardings, None))
        self.judge = jax.jit(self.trainer.judge)

    @property
    def setting(self) -> dict[str, Any]:
        """What decides the results."""
        config = {name: value for name, value in self.config.to_dict().items() if name not in MACHINE}
        config["compress"].pop("rules")
        rules = [[p, runner.describe(m, self.config.steps)] for p, m in self.config.compress.rules(self.config)]
        about = {"data": str(self.data), "checksum": self.data.checksum()}
        return {"config": runner.describe(config), "plan": rules, **about}

    def checkpoints(self) -> jc.io.Checkpoints:
        return jc.io.Checkpoints(self.workdir / "checkpoints", self.plan, max_to_keep=self.config.checkpoint.keep)

    def begin(self, checkpoints: jc.io.Checkpoints, step: int | None = None) -> steps.State:
        """The state of a checkpoint, by default the last, the data at its position; a fresh one if there is none."""
        if checkpoints.latest_step() is None:
            return jax.jit(self.trainer.init, out_shardings=self.shardings)()
        like = {"state": meshes.abstract(self.shapes, self.shardings), "data": ""}
        found = checkpoints.restore(like, step)
        self.batches.position = found["data"]
        return found["state"]

    def evaluate(self, state: steps.State) -> dict[str, float]:
        """Means over the test split, a last batch that is not whole left out."""
        size = min(self.config.batch_size, len(self.data.test))
        size -= size % meshes.examples_of(self.mesh)
        found = [self.judge(state, batch) for batch in pipeline.in_order(self.data.test, size, self.mesh)]
        found = jax.device_get(found[: self.config.eval_batches or None])
        return {name: float(np.mean([x[name] for x in found])) for name in ("loss", "accuracy")}


def run(
    config: ConfigDict,
    workdir: str | Path,
    data_dir: str | None = None,
    *,
    overwrite: bool = False,
    signals: runner.Signals | None = None,
) -> Result:
    """Train from the last checkpoint, or from the start, to the end; write and return the compressed parameters.

    Raises:
      ValueError: for anything wrong with the config, the data or the folder, on every process.
      Interrupted: at a signal, after everything was saved.
    """
    signals = signals or runner.Signals()
    prepared = agreed(lambda: Run(config, workdir, data_dir))
    folder = Path(workdir)
    with contextlib.ExitStack() as stack:
        record = agreed(lambda: _opened(stack, folder, prepared.setting, overwrite))
        checkpoints = stack.enter_context(prepared.checkpoints())
        state = agreed(lambda: prepared.begin(checkpoints))
        metrics = Metrics(folder, config.tensorboard, int(state.step))
        stack.callback(metrics.close)
        with signals.deferred():
            state = _trained(prepared, state, checkpoints, metrics, signals)
        scores = prepared.evaluate(state)
        metrics.write(int(state.step), "test", scores)
        tree = jax.jit(prepared.trainer.finish)(state)
        size = jc.save(folder / "model.jc", tree)
        if record is not None:
            record.save(finished=True, summary={**scores, "bytes": size})
    return Result(state, tree, {**scores, "bytes": size})


def agreed(make: Callable[[], Any]) -> Any:
    """What ``make`` gives; if it fails in one process it fails in all, so that none waits for another.

    Raises:
      RunError: in processes in which it did not fail.
    """
    found, error = None, None
    try:
        found = make()
    except (ValueError, OSError, ImportError) as failure:
        error = failure
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = np.flatnonzero(multihost_utils.process_allgather(np.int32(error is not None)))
        if len(failed) and error is None:
            error = RunError(f"process {int(failed[0])} of {jax.process_count()} failed; its own message says why")
    if error is not None:
        raise error
    return found


def _opened(stack: contextlib.ExitStack, folder: Path, setting: Mapping[str, Any], overwrite: bool) -> Record | None:
    """The record of the run, and the lock on its folder: for the first process."""
    if jax.process_index() != 0:
        return None
    stack.enter_context(Lock(folder))
    return Record(folder, setting, overwrite)


def _trained(
    prepared: Run, state: steps.State, checkpoints: jc.io.Checkpoints, metrics: Metrics, signals: runner.Signals
) -> steps.State:
    """The training loop, from where the state stands."""
    config, first = prepared.config, int(state.step)
    clock = Clock(first, config.steps, config.batch_size)
    for step in tqdm(range(first + 1, config.steps + 1), initial=first, unit="step", disable=None, leave=False):
        state, found = prepared.step(state, next(prepared.batches))
        last = step == config.steps
        if last or step % config.log_every == 0:
            values = {name: float(x) for name, x in jax.device_get(found).items()}
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(
                    f"step {step}: found loss {values['loss']}; lower config.optimizer.learning_rate"
                )
            metrics.write(step, "train", values)
            clock.say(step, values)
        if config.eval_every and not last and step % config.eval_every == 0:
            metrics.write(step, "test", prepared.evaluate(state))
        stops = signals.received is not None or checkpoints.reached_preemption(step)
        if stops or last or step % config.checkpoint.every == 0:
            checkpoints.save(step, {"state": state, "data": prepared.batches.position}, force=True)
        if stops and not last:
            checkpoints.wait()
            raise runner.Interrupted(signals.received or signal.SIGTERM)
    return state


def main(argv: Sequence[str]) -> int:
    """The command; its exit code is 0, 2 after one line on what is wrong, or 128 and the number of a signal."""
    chosen = flags.FLAGS
    if not chosen["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # checkpoints tell much
    if len(argv) > 1:
        return runner.refuse(f"{argv[1]!r} is no flag; see --help")
    if chosen.dry_run:
        try:
            print(Parts(chosen.config, meshes.make_mesh(chosen.config.mesh, chosen.dry_run)))
        except ValueError as error:
            return runner.refuse(error)
        return 0
    if chosen.distributed:
        jax.distributed.initialize(chosen.coordinator, chosen.processes, chosen.process)
    # Among several processes the notice of one must reach all: jax waits for the signal then.
    signals = runner.Signals() if jax.process_count() == 1 else contextlib.nullcontext(None)
    workdir = chosen.workdir or f"runs/{chosen.config.name}"
    with signals as listening:
        try:
            found = run(chosen.config, workdir, chosen.data_dir, overwrite=chosen.overwrite, signals=listening)
        except runner.Interrupted as stopped:
            again = command().replace(" --overwrite", "")
            print(f"interrupted by {stopped}, all saved; to continue: {again}", file=sys.stderr)
            return 128 + stopped.number
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            return runner.refuse(error)
    if jax.process_index() == 0:
        shown = ", ".join(f"{name} {value:,.4g}" for name, value in found.scores.items())
        print(f"test {shown}\nwritten to {workdir}")
    return 0


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """The flags of the command; those of the config are read from the command line too."""
    default = "experiments/configs/train_decoder.py"
    config_flags.DEFINE_config_file("config", default, "the config of the run", flag_values=values, sys_argv=list(argv))
    for name, text in {
        "workdir": "where to write, on all hosts the same folder; runs/<name> by default",
        "data_dir": "folder with the files of the data, where it is not made here",
        "coordinator": "host:port of process 0; found out on TPU pods and under SLURM",
    }.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    for name, text in {
        "processes": "how many; found out on TPU pods and under SLURM",
        "process": "which one this is; found out on TPU pods and under SLURM",
        "dry_run": "compute nothing: what each of so many devices would hold",
    }.items():
        flags.DEFINE_integer(name, None, text, flag_values=values)
    flags.DEFINE_bool("overwrite", False, "delete what an earlier run wrote to the workdir", flag_values=values)
    flags.DEFINE_bool("distributed", False, "this is one of several processes: connect them first", flag_values=values)


if __name__ == "__main__":
    define(flags.FLAGS, sys.argv)
    app.run(main)
