"""One model of a run: training it, compressing it by each plan, and measuring what was saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import jcompress as jc
from experiments import cost, models, train
from experiments.data import Data
from experiments.runs import Signals
from experiments.stages import PlanFunction, Program, Stage
from jcompress import measure
from jcompress.io import inspect, load, save

PyTree = Any
DENSE, BASELINE = "dense", "baseline"
"""The net as trained, and the same net with the fine-tuning epochs that every plan gets."""


class Checkpoint:
    """The training state of the stage in progress, in one file, written when a signal comes and now and then.

    The start of the stage is kept beside the state: compressed anew it gives the structure, and the saved arrays
    fill it, bit for bit.
    """

    def __init__(self, path: Path, signals: Signals, seconds: float = 60.0) -> None:
        self.path, self._signals, self._seconds = path, signals, seconds

    def after(self, where: Mapping[str, Any], start: PyTree) -> Callable[[train.State, int], None]:
        """What a training loop calls after each step; raises ``Interrupted`` once a signal came."""
        last = time.monotonic()

        def after(state: train.State, done: int) -> None:
            nonlocal last
            if self._signals.received is None and time.monotonic() - last < self._seconds:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            tree = {"start": start, "leaves": jax.tree.leaves(state)}
            save(self.path, tree, metadata={**where, "step": done})
            last = time.monotonic()
            self._signals.check()

        return after

    def stage(self, where: Mapping[str, Any]) -> tuple[int, PyTree, list[Any]] | None:
        """The stage in progress, where it started and the saved arrays, if the checkpoint is of this measurement."""
        if not self.path.exists():
            return None
        found = inspect(self.path)["metadata"]
        if any(found.get(key) != value for key, value in where.items()):
            return None
        tree = load(self.path)
        return found["stage"], tree["start"], tree["leaves"]

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


class Job:
    """One model with all of its plans, compiled once for all seeds.

    Args:
      name: of the model.
      config: see ``experiments/configs``.
      data: for the shapes.
      plans: functions as in ``config.plans``.
    """

    def __init__(self, name: str, config: ConfigDict, data: Data, plans: Sequence[PlanFunction]) -> None:
        self.name, self.config = name, config
        models.check(name, data.kind)
        self.module = models.build(name, data.classes, config.model_options.get(name, {}))
        self.apply = models.apply(self.module)
        self.evaluate = train.make_evaluate(self.apply)
        self._jitted = jax.jit(self.apply)
        example = data.test.x[:1]
        self.shapes = jax.eval_shape(self.module.init, jax.random.key(0), example)["params"]
        self.steps = train.steps_in(config.epochs, len(data.train), config.batch_size)
        self.extra = train.steps_in(config.finetune_epochs, len(data.train), config.batch_size)
        self.stages = {plan.__name__: plan(self.shapes, self.extra) for plan in plans}
        self.programs = {DENSE: [self._program(Stage([]), self.steps, config.learning_rate)]}
        for plan, stages in {BASELINE: [Stage([])], **self.stages}.items():
            try:
                self.programs[plan] = [self._program(s, self.extra, config.finetune_learning_rate) for s in stages]
            except ValueError as error:
                raise ValueError(f"{name}, plan {plan}: {error}") from None
        self._dense_cost: tuple[float, dict[str, float]] | None = None

    def _program(self, stage: Stage, steps: int, learning_rate: float) -> Program:
        return Program(stage, self.shapes, self.apply, steps, learning_rate)

    def start(self, data: Data, seed: int) -> PyTree:
        """Fresh parameters."""
        return models.init(self.module, jnp.asarray(data.train.x[:1]), jax.random.key(seed))

    def compress(self, plan: str, seed: int, dense: PyTree, data: Data, checkpoint: Checkpoint) -> PyTree:
        """Run all stages of one plan, from its checkpoint if it was interrupted.

        Raises:
          Interrupted: at a signal; calling it again continues.
        """
        where = {"model": self.name, "seed": seed, "plan": plan}
        first, leaves = 0, None
        if (found := checkpoint.stage(where)) is not None:
            first, dense, leaves = found
        tree = dense
        for number, program in enumerate(self.programs[plan]):
            if number < first:
                continue
            # The keys of stages differ; a plan's own name does not matter, so plans see the same batches.
            key = jax.random.fold_in(jax.random.key(seed), 1 + number + 100 * (plan != DENSE))
            state, held = program.begin(dense, key)
            if leaves is not None:
                state, leaves = jax.tree.unflatten(jax.tree.structure(state), leaves), None
            state = train.fit(
                program.step,
                state,
                held,
                data.train,
                steps=program.steps,
                batch_size=self.config.batch_size,
                key=key,
                title=f"{self.name} seed {seed} {plan}",
                after=checkpoint.after({**where, "stage": number}, dense),
            )
            tree = program.finish(state, held, key)
            dense = jc.materialize(tree)
        return tree

    def measure(self, plan: str, path: Path, data: Data) -> dict[str, Any]:
        """Load what was saved and measure that: accuracy, bytes, multiply-adds."""
        tree = load(path)
        params = jc.materialize(tree)
        if self._dense_cost is None:
            self._dense_cost = cost.multiply_adds(self.module, params, data.test.x)
        test = self.evaluate(params, data.test)
        row: dict[str, Any] = {
            "accuracy": test.accuracy,
            "correct": test.correct,
            "total": test.total,
            "bits_per_byte": test.bits if data.kind == "text" else None,
            "bytes": path.stat().st_size,
            "multiply_adds": round(cost.compressed_multiply_adds(tree, self._dense_cost)),
            "latency": None,
        }
        if len(data.val):
            validation = self.evaluate(params, data.val)
            row["validation_accuracy"] = validation.accuracy
            row["validation_bits"] = validation.bits
        if plan in (DENSE, BASELINE):
            found = measure.latency(self._jitted, params, jnp.asarray(data.test.x[: self.config.latency_batch]))
            row["latency"] = [found.median, found.low, found.high]
        return row
