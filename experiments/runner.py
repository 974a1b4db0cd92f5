"""All measurements of one config, in a folder of their own, continued where they were interrupted."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import data as datasets
from experiments import table
from experiments.data import Data
from experiments.jobs import BASELINE, DENSE, Checkpoint, Job
from experiments.runs import Interrupted, Record, Results, Signals, command
from experiments.stages import describe
from jcompress.io import load, save

_NOT_RESULTS = ("name", "plans", "only", "checkpoint_seconds", "latency_batch")
"""Config entries that may change between two pieces of one run; plans are compared by what they say."""


def run(config: ConfigDict, data_dir: str | None = None, workdir: str | None = None, overwrite: bool = False) -> int:
    """Run a config from beginning to end, or from where it stands.

    Returns:
      The exit code: 0; 2 if anything is wrong with the config, the data or the folder, after one line on stderr;
      128 + the signal's number if interrupted, after one line that says how to continue.
    """
    with Signals() as signals:
        try:
            job = Run(config, data_dir, workdir, overwrite, signals)
        except (ValueError, OSError) as error:
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            return 2
        try:
            job.measure_all()
            print(job.finish())
        except Interrupted as signal:
            job.record.save()
            print(f"interrupted by {signal}; to continue: {_again()}", file=sys.stderr)
            return 128 + signal.number
    return 0


def _again() -> str:
    return command().replace(" --overwrite", "")


class Run:
    """All measurements of one config, those that are done and those to do.

    Args:
      config: see ``experiments/configs``.
      data_dir: the folder of the data's files.
      workdir: where to write.
      overwrite: whether to delete an earlier run.
      signals: to stop at.

    Raises:
      ValueError: for anything wrong with the config, the data or the folder. Nothing was trained then.
    """

    def __init__(
        self, config: ConfigDict, data_dir: str | None, workdir: str | None, overwrite: bool, signals: Signals
    ) -> None:
        check(config)
        self.config, self.data_dir, self._signals = config, data_dir, signals
        self.plans = chosen(config)
        self.order = [DENSE, BASELINE, *self.plans]
        self.data = self.load(0)
        self.jobs = [Job(name, config, self.data, config.plans) for name in config.models]
        self.workdir = Path(workdir or f"runs/{config.name}")
        self.record = Record(self.workdir, self.setting(), overwrite)
        self.results = Results(self.workdir / "results.jsonl")
        self.checkpoint = Checkpoint(self.workdir / "checkpoint" / "state.jc", signals, config.checkpoint_seconds)
        (self.workdir / "models").mkdir(exist_ok=True)

    def load(self, seed: int) -> Data:
        options = self.config.data_options.to_dict()
        for name in options:
            if name not in datasets.OPTIONS:
                known = ", ".join(datasets.OPTIONS)
                raise ValueError(f"config.data_options: {name!r} is unknown; use some of {known}")
        return datasets.load(self.config.data, self.data_dir, seed, **options)

    def setting(self) -> dict[str, Any]:
        """What decides the results, as JSON values."""
        config = {k: v for k, v in self.config.to_dict().items() if k not in _NOT_RESULTS}
        every = {job.name: {plan: describe(x, job.extra) for plan, x in job.stages.items()} for job in self.jobs}
        return {"config": config, "data": str(self.data), "checksum": self.data.checksum(), "plans": every}

    def todo(self) -> Iterator[tuple[Job, int, str]]:
        for job in self.jobs:
            for seed in range(self.config.seeds):
                for plan in self.order:
                    yield job, seed, plan

    def measure_all(self) -> None:
        """Make every measurement that is not in ``results.jsonl`` yet."""
        todo = list(self.todo())
        data: dict[int, Data] = {}
        print(f"{self.data}; {len(todo)} measurements, to {self.workdir}", flush=True)
        done = sum(self.results.find(model=j.name, seed=s, plan=p) is not None for j, s, p in todo)
        if done:
            print(f"continuing: {done} measurements are there already", flush=True)
        for number, (job, seed, plan) in enumerate(todo, 1):
            self._signals.check()
            if self.results.find(model=job.name, seed=seed, plan=plan) is None:
                data = data if seed in data else {seed: self.load(seed)}
                row = self.measure(job, seed, plan, data[seed])
                self.results.add(row)
                self.checkpoint.clear()
                tqdm.write(f"[{number}/{len(todo)}] {table.line(row)}")
                sys.stdout.flush()

    def measure(self, job: Job, seed: int, plan: str, data: Data) -> dict[str, Any]:
        start, path = time.monotonic(), self.path(job, seed, plan)
        dense = job.start(data, seed) if plan == DENSE else load(self.path(job, seed, DENSE))
        tree = job.compress(plan, seed, dense, data, self.checkpoint)
        about = {"data": self.config.data, "model": job.name, "seed": seed, "plan": plan}
        options = {
            "data_options": self.config.data_options.to_dict(),
            "model_options": self.config.model_options.get(job.name, ConfigDict()).to_dict(),
        }
        save(path, tree, metadata={**about, **{k: v for k, v in options.items() if v}})
        row = {"model": job.name, "seed": seed, "plan": plan, **job.measure(plan, path, data)}
        row["ratio"] = self.path(job, seed, DENSE).stat().st_size / row["bytes"]
        return {**row, "file": str(path.relative_to(self.workdir)), "seconds": round(time.monotonic() - start, 2)}

    def path(self, job: Job, seed: int, plan: str) -> Path:
        return self.workdir / "models" / f"{job.name}-seed{seed}-{plan}.jc"

    def finish(self) -> str:
        """Write the table, the picture and the record; return the table."""
        rows = table.summarize(self.results.rows, [(job.name, plan) for job in self.jobs for plan in self.order])
        text = table.text(rows)
        (self.workdir / "table.txt").write_text(text + "\n")
        (self.workdir / "table.md").write_text(table.markdown(rows) + "\n")
        table.picture(rows, self.workdir / "pareto.png", str(self.data))
        self.record.save(summary=rows, finished=True)
        return f"\n{text}\n\nwritten to {self.workdir}: table, results.jsonl, pareto.png, record.json and the models"


def check(config: ConfigDict) -> None:
    """Raise for numbers out of range."""
    for name in ("seeds", "epochs", "finetune_epochs", "batch_size", "learning_rate", "finetune_learning_rate"):
        if not config[name] > 0:
            raise ValueError(f"config.{name}={config[name]} must be positive")


def chosen(config: ConfigDict) -> list[str]:
    """The names of the plans to run."""
    known = [plan.__name__ for plan in config.plans]
    names = [name.strip() for name in config.only.split(",") if name.strip()] or known
    for name in names:
        if name not in known:
            raise ValueError(f"config.only: plan {name!r} is unknown; use some of {','.join(known)}")
    return names
