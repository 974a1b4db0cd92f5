"""Methods x levels x seeds through any executor: whole curves as one program, a file for each job, one table.

    python -m experiments.sweep                                          # two processes on this machine
    python -m experiments.sweep --executor=dask --address=tcp://scheduler:8786
    python -m experiments.sweep --executor=submitit --config.methods=magnitude,int

Levels of a method whose shapes do not depend on them (sparsities) and all seeds are trained together, by ``vmap``;
other levels are jobs of their own. Each job writes its rows to a file of its own, in one piece, so a sweep that was
stopped or lost a worker goes on by the same command. The engine is whatever has ``submit(function, *arguments)`` and
gives things with ``result()``: an executor of ``concurrent.futures``, that of a Dask cluster or of SLURM.

Expect on the digits, LeNet-300-100, 3 seeds, with ``--config.finetune_epochs=2``: test accuracy of 97.5 percent dense,
98.2 +- 0.3 at 80 percent sparsity (4.4x) and 93.5 +- 1.5 at 90, 97.6 +- 0.4 in 2 bits (12.8x), 97.4 with four shared
values (14.2x); 42 CPU seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments import data as datasets
from experiments import flags, runner, tables
from experiments.lab import Lab, batches, cross_entropy, steps_in
from experiments.training import steps
from experiments.training.tasks import Task
from experiments.workdir import Lock, Record, Row, RunError, write
from jcompress import measure

PyTree = Any
KERNELS = ".*/kernel"
DENSE = "dense"


# ---- What is compared ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
    """A family of methods, one for each level.

    Attributes:
      rules: from a level to the rules of a plan.
      levels: numbers.
      traced: whether the level may be a traced array: all levels are then one program.
      how: what is trained, see :class:`experiments.training.steps.Trainer`.
    """

    rules: Callable[[Any], list[tuple[str, Any]]]
    levels: tuple[float, ...]
    traced: bool = False
    how: str = "nodes"


def magnitude(level: Any) -> list[tuple[str, Any]]:
    """The smallest weights of all layers go."""
    return [(KERNELS, jc.prune.Magnitude(sparsity=level, scope="global"))]


def random(level: Any) -> list[tuple[str, Any]]:
    """The control: as many weights go, chosen at random."""
    return [(KERNELS, jc.prune.Random(sparsity=level, scope="global"))]


def integers(level: Any) -> list[tuple[str, Any]]:
    """Codes of so many bits, learned straight through the rounding."""
    return [(KERNELS, jc.quantize.Int(bits=int(level)))]


def shared(level: Any) -> list[tuple[str, Any]]:
    """So many shared values a kernel."""
    return [(KERNELS, jc.share.KMeans(clusters=int(level)))]


SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
METHODS = {
    "magnitude": Method(magnitude, SPARSITIES, traced=True),
    "random": Method(random, SPARSITIES, traced=True),
    "int": Method(integers, (2, 3, 4, 8), how="simulate"),
    "kmeans": Method(shared, (4, 16)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Fork this, or change a value with ``--config.<name>=<value>``."""

    name: str = "sweep"
    data: str = "digits"
    data_options: dict[str, Any] = dataclasses.field(default_factory=lambda: {"val": 0.2, "test": 0.2})
    model: str = "lenet_300_100"
    methods: tuple[str, ...] = tuple(METHODS)
    levels: dict[str, tuple] = dataclasses.field(default_factory=dict)  # {method: levels} in place of its own
    seeds: int = 3
    epochs: float = 40.0
    finetune_epochs: float = 40.0
    batch_size: int = 64
    learning_rate: float = 2e-3


@dataclasses.dataclass(frozen=True)
class Job:
    """What one call of :func:`measure_job` measures: a method at some levels, all seeds."""

    method: str
    levels: tuple[float, ...]

    @property
    def name(self) -> str:
        return "-".join([self.method, *(f"{level:g}" for level in self.levels)])


def jobs(config: Config) -> list[Job]:
    """Those of a config, the dense networks left out.

    Raises:
      ValueError: for a method that there is not.
    """
    found = []
    for name in config.methods:
        if name not in METHODS:
            raise ValueError(f"config.methods: {name!r} is unknown; use some of {','.join(METHODS)}")
        method, levels = METHODS[name], tuple(config.levels.get(name, METHODS[name].levels))
        found += [Job(name, part) for part in ([levels] if method.traced else [(level,) for level in levels])]
    return found


# ---- One job: levels and seeds as lanes of one program ---------------------------------------------------------------


class Lanes:
    """Training of many networks of one model at once.

    Args:
      config: of the sweep.
      data_dir: the folder of the data's files.
    """

    def __init__(self, config: Config, data_dir: str | None) -> None:
        load = functools.partial(datasets.of, config.data, data_dir, config.data_options)
        self.config, self.lab = config, Lab(config.model, load)
        self.data = self.lab.load(0)

        def loss(params: PyTree, extra: PyTree, batch: dict[str, jax.Array]) -> tuple[jax.Array, PyTree]:
            return cross_entropy(self.lab.apply(params, batch["x"]), batch["y"]).mean(), extra

        def judge(params: PyTree, extra: PyTree, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            logits = self.lab.apply(params, batch["x"])
            nats = cross_entropy(logits, batch["y"]).mean()
            return {"accuracy": (logits.argmax(-1) == batch["y"]).mean(dtype=jnp.float32), "loss": nats}

        self.task = Task(self.data.kind, lambda key: (self.lab.start(0), {}), loss, judge)

    def trained(self, method: Method, levels: Sequence[float], start: PyTree, epochs: float, first: int) -> PyTree:
        """Final states, the first axes levels and seeds, from parameters with an axis of seeds.

        Args:
          method: under which they are trained.
          levels: of the method.
          start: parameters.
          epochs: of training.
          first: the key of the order of the examples for the first seed.
        """
        size, seeds = self.config.batch_size, range(self.config.seeds)
        total = steps_in(epochs, len(self.data.train), size)
        begin, step = self.compiled(method, levels, total)
        lanes = self.given(method, levels)
        state = begin(*lanes, start)
        orders = [batches(jax.random.key(first + seed), len(self.data.train), size) for seed in seeds]
        x, y = jnp.asarray(self.data.train.x), jnp.asarray(self.data.train.y)
        for _ in range(total):
            state = step(*lanes, state, x, y, np.stack([next(order) for order in orders]))
        return state

    def given(self, method: Method, levels: Sequence[float]) -> tuple[jax.Array, jax.Array]:
        """Levels and seeds for programs; one level for all where they are not traced."""
        return jnp.asarray(levels if method.traced else [0.0], jnp.float32), jnp.arange(self.config.seeds)

    def trainer(self, method: Method, levels: Sequence[float], total: int, level: Any, seed: Any) -> steps.Trainer:
        """For one lane."""
        plan = jc.plan(self.lab.shapes, method.rules(level if method.traced else levels[0]))
        options = {"learning_rate": self.config.learning_rate, "clip": 0.0}
        return steps.Trainer(self.task, plan, method.how, steps.make_optimizer(options, total), seed=seed)

    def compiled(self, method: Method, levels: Sequence[float], total: int) -> tuple[Callable, Callable]:
        """The start and the step of all lanes."""
        of = functools.partial(self.trainer, method, levels, total)

        def begin(level: jax.Array, seed: jax.Array, params: PyTree) -> steps.State:
            return of(level, seed).start(params, {})

        def step(level: jax.Array, seed: jax.Array, state: steps.State, *given: jax.Array) -> steps.State:
            x, y, index = given
            return of(level, seed).step(state, {"x": x[index][None], "y": y[index][None]})[0]

        both = jax.vmap(jax.vmap(begin, (None, 0, 0)), (0, None, None))
        many = jax.vmap(jax.vmap(step, (None, 0, 0, None, None, 0)), (0, None, 0, None, None, None))
        return jax.jit(both), jax.jit(many, donate_argnums=2)

    def finished(self, method: Method, levels: Sequence[float], state: steps.State) -> PyTree:
        """Trees in storage form, the first axes levels and seeds."""

        def finish(level: jax.Array, seed: jax.Array, state: steps.State) -> PyTree:
            return self.trainer(method, levels, 1, level, seed).finish(state)

        lanes = jax.vmap(jax.vmap(finish, (None, 0, 0)), (0, None, 0))
        return jax.jit(lanes)(*self.given(method, levels), state)

    def rows(self, name: str, levels: Sequence[float], trees: PyTree) -> list[Row]:
        """What is measured of each lane, one by one: their sizes depend on their values."""
        found = []
        for i, level in enumerate(levels):
            for seed in range(self.config.seeds):
                tree = jax.tree.map(lambda x, at=(i, seed): x[at], trees)
                score = self.lab.evaluate(jc.materialize(tree), self.data.test)
                about = {"method": name, "level": level, "seed": seed}
                found.append(about | {"accuracy": score.accuracy, "bits": jc.nbits(tree), "bytes": jc.nbits(tree) // 8})
        return found


def measure_dense(config: Config, data_dir: str | None, folder: str) -> list[Row]:
    """Train the dense networks of all seeds and store them."""
    lanes, none = Lanes(config, data_dir), Method(lambda level: [], (0.0,))
    start = jax.tree.map(lambda *x: jnp.stack(x), *[lanes.lab.start(seed) for seed in range(config.seeds)])
    state = lanes.trained(none, (0.0,), start, config.epochs, first=1_000)
    jc.save(Path(folder) / "dense.jc", jax.tree.map(lambda x: x[0], state.params))
    return lanes.rows(DENSE, (0.0,), state.params)


def measure_job(config: Config, data_dir: str | None, folder: str, job: Job) -> list[Row]:
    """Compress the dense networks by a method at its levels, fine-tune, and measure what would be stored."""
    lanes, method = Lanes(config, data_dir), METHODS[job.method]
    state = lanes.trained(method, job.levels, jc.load(Path(folder) / "dense.jc"), config.finetune_epochs, first=2_000)
    return lanes.rows(job.method, job.levels, lanes.finished(method, job.levels, state))


# ---- Any executor ----------------------------------------------------------------------------------------------------


def sweep(work: dict[Path, tuple[Callable[..., list[Row]], tuple]], executor: Any) -> list[Row]:
    """Run what is not there yet; all rows, in the order of the work.

    Args:
      work: for each file the function that gives its rows, and its arguments. They travel to workers, as does what is
        raised there.
      executor: anything with ``submit(function, *arguments)`` that gives things with ``result()``.

    Raises:
      RunError: if jobs failed; the message names them. The rows of all others are written.
    """
    todo = {path: call for path, call in work.items() if not path.exists()}
    waiting = {
        path: executor.submit(kept, str(path), function, arguments) for path, (function, arguments) in todo.items()
    }
    failed = {}
    for number, (path, future) in enumerate(waiting.items(), 1):
        try:
            rows = future.result()
        except Exception as error:  # whatever a job raises, or an engine that lost its worker
            failed[path.stem] = f"{type(error).__name__}: {error}".splitlines()[-1].strip()
        else:
            if not path.exists():  # a worker that does not see this folder
                write(path, json.dumps(rows) + "\n")
            print(f"[{number}/{len(waiting)}] {path.stem}", flush=True)
    if failed:
        name, why = next(iter(failed.items()))
        raise RunError(f"{len(failed)} of {len(work)} jobs failed, {name} by {why}; the same command tries them again")
    return [row for path in work for row in json.loads(path.read_text())]


def kept(path: str, function: Callable[..., list[Row]], arguments: tuple) -> list[Row]:
    """What a worker runs: the rows of a job, written to its file in one piece where its folder is seen."""
    rows = function(*arguments)
    if Path(path).parent.is_dir():
        write(Path(path), json.dumps(rows) + "\n")
    return rows


@contextlib.contextmanager
def executor_of(kind: str, workers: int, address: str | None, folder: Path) -> Iterator[Any]:
    """An engine by name.

    Raises:
      ValueError: if it is not installed, or there is none of this name.
    """
    if kind == "local":
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool
    elif kind == "dask":
        try:
            from distributed import Client
        except ImportError:
            raise ValueError("--executor=dask needs distributed; pip install 'jcompress[dask]'") from None
        with Client(address, set_as_default=False) as client:
            yield client.get_executor(pure=False)
    else:
        try:
            import submitit
        except ImportError:
            raise ValueError("--executor=submitit needs submitit; pip install submitit") from None
        engine = submitit.AutoExecutor(folder=folder / "slurm")
        engine.update_parameters(slurm_array_parallelism=workers, timeout_min=240)
        yield engine


# ---- The table and the front -----------------------------------------------------------------------------------------


def summarize(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means over seeds of each method and level, and whether nothing is both smaller and better."""
    size = next(row["bytes"] for row in rows if row["method"] == DENSE)
    found = []
    for method, level in dict.fromkeys((row["method"], row["level"]) for row in rows):
        own = [row for row in rows if (row["method"], row["level"]) == (method, level)]
        mean, std = tables.mean_std([100 * row["accuracy"] for row in own])
        stored = float(np.mean([row["bytes"] for row in own]))
        about = {"method": method, "level": level, "mean": mean, "std": std, "seeds": len(own)}
        found.append({**about, "bytes": stored, "ratio": size / stored})
    best = {p.label for p in measure.non_dominated(points(found))}
    return [{**row, "front": _label(row) in best} for row in found]


def points(found: Iterable[Row]) -> list[measure.Point]:
    """For the front and its picture."""
    return [measure.Point(_label(r), r["bytes"], r["mean"], r["std"] or 0.0, r["method"]) for r in found]


def _label(row: Row) -> str:
    return row["method"] if row["method"] == DENSE else f"{row['method']} {row['level']:g}"


def finish(rows: Sequence[Row], folder: Path) -> str:
    """Write rows, table and picture; the table as text."""
    found = summarize(rows)
    cells = [["method", "level", "test accuracy (%)", "bytes", "ratio", "front"]]
    for row in found:
        accuracy = tables.spread(row["mean"], row["std"])
        size = [f"{row['bytes']:,.0f}", f"{row['ratio']:.1f}x"]
        cells.append([row["method"], f"{row['level']:g}", accuracy, *size, "yes" if row["front"] else ""])
    write(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(folder / "table.md", tables.markdown(cells, (0, 5)) + "\n")
    measure.pareto(points(found), folder / "pareto.png", score_name="test accuracy (%)")
    return tables.aligned(cells, (0, 5))


def run(config: Config, folder: Path, executor: Any, data_dir: str | None = None, overwrite: bool = False) -> str:
    """The whole sweep, from where it stands.

    Raises:
      ValueError: for anything wrong with the config or the folder, and for jobs that failed.
    """
    wanted = jobs(config)
    setting = {**dataclasses.asdict(config), "methods": None, "levels": None}
    with Lock(folder):
        record = Record(folder, runner.describe(setting), overwrite)
        (folder / "rows").mkdir(exist_ok=True)
        given = (config, data_dir, str(folder.resolve()))
        rows = sweep({folder / "rows" / f"{DENSE}.json": (measure_dense, given)}, executor)
        work = {folder / "rows" / f"{job.name}.json": (measure_job, (*given, job)) for job in wanted}
        text = finish(rows + sweep(work, executor), folder)
        record.save(finished=True)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(__doc__, "runs/<name of the config>")
    parser.add_argument("--executor", choices=("local", "dask", "submitit"), default="local", help="what runs the jobs")
    parser.add_argument("--workers", type=flags.positive, default=2, help="processes, or jobs of SLURM at once")
    parser.add_argument("--address", help="of the scheduler of a Dask cluster; one on this machine without it")
    args, config = flags.parse(parser, lambda name: Config(data=name), argv)
    folder = Path(args.workdir or f"runs/{config.name}")
    try:
        with executor_of(args.executor, args.workers, args.address, folder) as executor:
            print(f"{run(config, folder, executor, args.data_dir, args.overwrite)}\n\nwritten to {folder}")
    except (ValueError, OSError, ImportError) as error:
        return runner.refuse(error)
    return 0


if __name__ == "__main__":
    from experiments import sweep as module  # what workers import, not a second copy of it

    sys.exit(module.main())
