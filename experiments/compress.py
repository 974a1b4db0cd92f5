"""The main job: train small models on real data, compress them by each plan of a config, fine-tune, measure.

Examples:
  python -m experiments.compress
  python -m experiments.compress --config.data=mnist --data_dir=<folder with MNIST's idx files>
  python -m experiments.compress --config.data=text --data_dir=<folder with tinyshakespeare.txt>
  python -m experiments.compress --config=my_config.py --config.only=int8,svd --config.seeds=5

It writes to ``--workdir``: ``table.txt`` and ``table.md``, ``results.jsonl``, ``pareto.png``, ``record.json``, and
the compressed models. Interrupted, the same command continues.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from experiments import data as datasets
from experiments import table
from experiments.data import Data
from experiments.jobs import BASELINE, DENSE, Checkpoint, Job
from experiments.runs import Interrupted, Record, Results, Signals, command
from experiments.stages import describe
from jcompress.io import StorageError, load, save

_CONFIGS = Path(__file__).parent / "configs"
_CONFIG = config_flags.DEFINE_config_file("config", str(_CONFIGS / "digits.py"), "What to train and compress.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder with the files of the data, where it is not embedded.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where to write; results/<name of the config> by default.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Delete what an earlier run wrote to the workdir.")

_NOT_RESULTS = ("name", "plans", "only", "checkpoint_seconds", "latency_batch")
"""Config entries that may change between two pieces of one run; plans are compared by what they say."""


def main(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        return _complain(f"{argv[1]!r} is no flag; see --help")
    with Signals() as signals:
        try:
            run = Run(_CONFIG.value, _DATA_DIR.value, _WORKDIR.value, _OVERWRITE.value, signals)
        except (ValueError, OSError) as error:
            return _complain(str(error))
        try:
            run.measure_all()
            print(run.finish())
        except Interrupted as signal:
            run.record.save()
            print(f"interrupted by {signal}; to continue: {_again()}", file=sys.stderr)
            return 128 + signal.number
    return 0


def _complain(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


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
        self.data = self.load(0)
        self.jobs = [Job(name, config, self.data, self.plans) for name in config.models]
        self.workdir = Path(workdir or f"results/{config.name}")
        self.record = Record(self.workdir, self.setting(), overwrite)
        self.results = Results(self.workdir / "results.jsonl")
        self.checkpoint = Checkpoint(self.workdir / "checkpoint" / "state.jc", signals, config.checkpoint_seconds)
        (self.workdir / "models").mkdir(exist_ok=True)

    def load(self, seed: int) -> Data:
        return datasets.load(self.config.data, self.data_dir, seed, **self.config.data_options.to_dict())

    def setting(self) -> dict[str, Any]:
        """What decides the results, as JSON values."""
        config = {k: v for k, v in self.config.to_dict().items() if k not in _NOT_RESULTS}
        every = {
            job.name: {
                plan: describe(make(job.shapes, job.extra), job.extra) for plan, make in self.config.plans.items()
            }
            for job in self.jobs
        }
        return {"config": config, "data": str(self.data), "checksum": self.data.checksum(), "plans": every}

    def todo(self) -> Iterator[tuple[Job, int, str]]:
        for job in self.jobs:
            for seed in range(self.config.seeds):
                for plan in (DENSE, BASELINE, *self.plans):
                    yield job, seed, plan

    def measure_all(self) -> None:
        """Make every measurement that is not in ``results.jsonl`` yet."""
        todo, data = list(self.todo()), {}
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
        rows = table.summarize(
            self.results.rows, [(job.name, p) for job in self.jobs for p in (DENSE, BASELINE, *self.plans)]
        )
        text = table.text(rows)
        (self.workdir / "table.txt").write_text(text + "\n")
        (self.workdir / "table.md").write_text(table.markdown(rows) + "\n")
        table.picture(rows, self.workdir / "pareto.png", str(self.data))
        self.record.save(summary=rows, finished=True)
        return f"\n{text}\n\nwritten to {self.workdir}: table.txt, table.md, pareto.png, results.jsonl, record.json, models/"


def check(config: ConfigDict) -> None:
    """Raise for numbers out of range."""
    for name in ("seeds", "epochs", "finetune_epochs", "batch_size", "learning_rate", "finetune_learning_rate"):
        if not config[name] > 0:
            raise ValueError(f"config.{name}={config[name]} must be positive")


def chosen(config: ConfigDict) -> list[str]:
    """The names of the plans to run."""
    known = list(config.plans)
    names = [name.strip() for name in config.only.split(",") if name.strip()] or known
    for name in names:
        if name not in known:
            raise ValueError(f"config.only: plan {name!r} is unknown; use some of {','.join(known)}")
    return names


def with_config_of_data(argv: Sequence[str]) -> list[str]:
    """Put the config file of the data in ``--config.data=<data>`` first, where no file is asked for."""
    named = [a.split("=", 1)[1] for a in argv if a.lstrip("-").startswith("config.data=")]
    given = any(a.lstrip("-") == "config" or a.lstrip("-").startswith("config=") for a in argv)
    path = _CONFIGS / f"{named[-1]}.py" if named and named[-1].isidentifier() else None
    if given or path is None or not path.exists():
        return list(argv)
    return [argv[0], f"--config={path}", *argv[1:]]


if __name__ == "__main__":
    try:
        app.run(main, argv=with_config_of_data(sys.argv))
    except StorageError as error:
        sys.exit(_complain(str(error)))
