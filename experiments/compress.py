"""The main job: train small models on real data, compress each in several ways, fine-tune, measure what was stored.

Examples:
  python -m experiments.compress
  python -m experiments.compress --config.data=mnist --data_dir=<folder with MNIST's idx files>
  python -m experiments.compress --config.data=text --data_dir=<folder with tinyshakespeare.txt>
  python -m experiments.compress --config=my_config.py --config.only=int8,svd --config.seeds=5

It writes to ``--workdir``: ``table.txt`` and ``table.md``, ``results.jsonl``, ``pareto.png``, ``record.json``, and
the compressed models. Interrupted, the same command continues.

To make an experiment of your own, copy this file: what is measured (:class:`Config`), the ways to compress, how each
is trained, and the training loop all stand here. The runner that it hands its rows to knows nothing of them.

Expect on the digits, over 3 seeds, test accuracy of LeNet-300-100 97.2 +- 1.0 percent (203 kB) and of the CNN 98.4 +-
0.3 percent (55 kB) as dense baselines; 4 bits 97.3 and 98.5 percent at 29 and 8.5 kB; 90 percent pruned gradually
97.4 and 97.9 percent; pruned, shared and fine-tuned (deep_compression) 97.8 percent at 7.6 kB (26.7x) and 97.3 percent
at 3.2 kB (17x); a random mask 96.4 and 85.7 percent. ``results/compress`` has all rows. It took 239 CPU seconds on two
cores that other jobs kept busy.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import jcompress as jc
from experiments import cost, flags, runner, tables
from experiments import data as datasets
from experiments.lab import Apply, Lab, batches, cross_entropy, steps_in
from experiments.runner import Signals, Way, describe
from experiments.workdir import Checkpoint, Row, Rows, write
from jcompress import measure
from jcompress.io import load, save

PyTree = Any
KERNELS = ".*/kernel"
SPARSITY = 0.9


# ---- How a network is trained on its way -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stage:
    """Rules for ``jcompress.plan``, and how the network is trained under them.

    Attributes:
      rules: ordered pairs of a pattern and a method.
      train: ``"nodes"``: compress, then train what is trainable inside the nodes (kept weights, factors, codebooks,
        scales). ``"project"``: train dense weights, held on the compressed set by ``jcompress.project`` after each
        step. ``"simulate"``: train dense weights whose forward pass is compressed, the backward pass straight
        through. ``"none"``: compress only.
      part: this stage's part of the fine-tuning steps.
      every: steps between refits, for ``"project"``.
      host: whether a method reads values (``SVD(energy=...)``, ``KMeans(exact=True)``), so cannot run under ``jit``.
    """

    rules: Sequence[tuple[str, Any]]
    train: Literal["nodes", "project", "simulate", "none"] = "nodes"
    part: float = 1.0
    every: int = 16
    host: bool = False

    def __post_init__(self) -> None:
        if self.train not in ("nodes", "project", "simulate", "none"):
            raise ValueError(f"Stage: train={self.train!r} is unknown; use 'nodes', 'project', 'simulate' or 'none'")


# ---- The ways to compress: from the shapes of the parameters and the fine-tuning steps to stages ---------------------


def int8(params: PyTree, steps: int) -> list[Stage]:
    """8 bits, a scale for each output channel; the weights learn through the rounding (straight-through)."""
    return [Stage([(KERNELS, jc.quantize.Int(bits=8))], train="simulate")]


def int4(params: PyTree, steps: int) -> list[Stage]:
    """4 bits, the scales chosen for the least squared error."""
    return [Stage([(KERNELS, jc.quantize.Int(bits=4, clip="mse"))], train="simulate")]


def svd(params: PyTree, steps: int) -> list[Stage]:
    """Each kernel but the head as two factors with a third of its numbers; the factors are fine-tuned."""
    return [Stage(low_rank(params, "(?!head/)" + KERNELS, part=1 / 3))]


def kmeans(params: PyTree, steps: int) -> list[Stage]:
    """Each kernel with 16 shared values, which are fine-tuned."""
    return [Stage([(KERNELS, jc.share.KMeans(clusters=16))])]


def magnitude(params: PyTree, steps: int) -> list[Stage]:
    """The smallest weights of all layers go at once; the others are fine-tuned."""
    return [Stage([(KERNELS, jc.prune.Magnitude(sparsity=SPARSITY, scope="global"))])]


def gradual(params: PyTree, steps: int) -> list[Stage]:
    """The smallest weights go little by little, on a cubic ramp over the first half of the steps."""
    return [Stage([(KERNELS, jc.prune.Magnitude(sparsity=ramp(SPARSITY, steps), scope="global"))], train="project")]


def random(params: PyTree, steps: int) -> list[Stage]:
    """The control: as many weights go, chosen at random."""
    return [Stage([(KERNELS, jc.prune.Random(sparsity=SPARSITY, scope="global"))])]


def deep_compression(params: PyTree, steps: int) -> list[Stage]:
    """Gradual pruning, then k-means of what is left; the shared values and the biases are kept in 16 bits."""
    half = jc.quantize.Float("float16")
    pruned = jc.prune.Magnitude(sparsity=ramp(SPARSITY, steps), scope="global")
    shared = jc.chain(jc.prune.Magnitude(sparsity=SPARSITY, scope="global"), jc.share.KMeans(clusters=16), half)
    return [Stage([(KERNELS, pruned)], train="project", part=0.7), Stage([(KERNELS, shared), (".*", half)], part=0.3)]


@functools.cache  # two ways with one ramp are then compiled once
def ramp(sparsity: float, steps: int) -> optax.Schedule:
    """From 0 to ``sparsity`` over the first half of the steps, fast at first (Zhu & Gupta 2017)."""
    return optax.polynomial_schedule(0.0, sparsity, power=3, transition_steps=max(steps // 2, 1))


def low_rank(params: PyTree, pattern: str, part: float) -> list[tuple[str, Any]]:
    """A rule for each matrix that matches: factors with ``part`` of its numbers."""
    rules = []
    for path, kernel in jc.paths(params):
        rows, columns = math.prod(kernel.shape[:-1]), kernel.shape[-1]
        rank = int(part * rows * columns / (rows + columns))
        if re.fullmatch(pattern, path) and rank:
            rules.append((re.escape(path), jc.factorize.SVD(rank=rank)))
    return rules


def staged(stages: Callable[[PyTree, int], list[Stage]]) -> Way:
    """The way of these stages, from the dense network; it bears the function's name."""

    def told(job: Job) -> Any:
        return describe([program.stage for program in job.programs(stages)], job.extra)

    return Way(stages.__name__, lambda job, seed: job.follow(stages.__name__, job.programs(stages), seed), told)


def baseline(params: PyTree, steps: int) -> list[Stage]:
    """The dense network, trained for as many more steps as every other way."""
    return [Stage([])]


DENSE = Way("dense", lambda job, seed: job.follow("dense", [job.dense_program()], seed))
BASELINE = staged(baseline)


# ---- What is measured ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Fork this, or change a value with ``--config.<name>=<value>``."""

    name: str = "digits"
    data: str = "digits"
    data_options: dict[str, Any] = dataclasses.field(default_factory=lambda: {"val": 0.2, "test": 0.2})
    models: tuple[str, ...] = ("lenet_300_100", "cnn")
    model_options: dict[str, dict] = dataclasses.field(default_factory=dict)  # {model: {field: value}}
    ways: tuple[Way, ...] = tuple(map(staged, (int8, int4, svd, kmeans, magnitude, gradual, random, deep_compression)))
    only: str = ""  # some of the ways, joined by commas; all of them by default
    seeds: int = 3  # each with its own split, where the data has none, its own start and its own batches

    epochs: float = 40.0
    finetune_epochs: float = 60.0  # every way, and the dense baseline, gets these once
    batch_size: int = 64
    learning_rate: float = 2e-3
    finetune_learning_rate: float = 3e-3

    latency_batch: int = 256
    checkpoint_seconds: float = 60.0


def config_of(data: str) -> Config:
    """That of the digits stands here, those of other data in ``experiments/configs``."""
    if data == "digits":
        return Config()
    if data not in ("mnist", "text"):
        raise LookupError(data)
    return importlib.import_module(f"experiments.configs.{data}").get_config()


# ---- Training --------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What training changes: parameters, optimizer state, and the number of steps taken."""

    params: PyTree
    opt_state: PyTree
    step: jax.Array


class Pace(NamedTuple):
    """The learning rate at its peak, and the steps over which it falls to 0 as a cosine; traced, so a step compiled
    for one pace serves all."""

    peak: float
    steps: int

    def __call__(self, count: jax.Array) -> jax.Array:
        return self.peak * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count / self.steps, 1)))


def make_step(
    apply: Apply, transform: Callable[..., optax.GradientTransformation], forward: Callable[..., PyTree] | None = None
) -> Callable[..., tuple[State, jax.Array]]:
    """One jitted step, ``step(state, held, pace, x, y, index) -> (state, loss)``; ``state`` is donated.

    Args:
      apply: the model, ``apply(params, x) -> logits``.
      transform: the optimizer, ``transform(pace)``. It gets the raw gradients as the extra argument ``grads``.
      forward: from what is trained to the parameters of the model, ``forward(params, held, step)``.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, held: Any, pace: Any, x: jax.Array, y: jax.Array, index: jax.Array) -> tuple:
        def loss(params: PyTree) -> jax.Array:
            dense = params if forward is None else forward(params, held, state.step)
            return cross_entropy(apply(dense, x[index]), y[index]).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        tx = optax.with_extra_args_support(transform(pace))
        updates, opt_state = tx.update(grads, state.opt_state, state.params, grads=grads)
        return State(optax.apply_updates(state.params, updates), opt_state, state.step + 1), value

    return step


def fit(
    step: Callable[..., tuple[State, jax.Array]],
    state: State,
    held: PyTree,
    split: datasets.Split,
    *,
    steps: int,
    batch_size: int,
    key: jax.Array,
    pace: Any = None,
    title: str = "",
    after: Callable[[State, int], None] | None = None,
) -> State:
    """Train until ``steps`` steps are taken, from wherever ``state`` stands.

    The batches depend on the key and the step only, so a run that continues sees what an unbroken one would have.

    Args:
      step: from :func:`make_step`.
      state: where to start; donated.
      held: passed through to ``step``.
      split: training examples.
      steps: the number of steps in total.
      batch_size: examples a step.
      key: of the order of the examples.
      pace: passed through to ``step``.
      title: shown on the progress bar, which is quiet where there is no terminal.
      after: called after each step with the state and the number of steps taken.
    """
    x, y, first = jnp.asarray(split.x), jnp.asarray(split.y), int(state.step)
    order = zip(range(first + 1, steps + 1), batches(key, len(split), batch_size, first), strict=False)
    with tqdm(total=steps, initial=first, desc=title, unit="step", disable=None, leave=False) as bar:
        for done, index in order:
            state, loss = step(state, held, pace, x, y, index)
            bar.update()
            if not bar.disable and done % 50 == 0:
                bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
            if after is not None:
                after(state, done)
    return state


class Program:
    """One stage for one model, compiled once and run for every seed.

    Args:
      stage: what to do.
      lab: the model. What is compiled is shared by stages of equal rules, and by all that train nodes of one structure.
      steps: training steps of the whole way.
      learning_rate: of Adam, at its peak.
    """

    def __init__(self, stage: Stage, lab: Lab, steps: int, learning_rate: float) -> None:
        self.stage = stage
        self.steps = 0 if stage.train == "none" else max(round(steps * stage.part), 1)
        self.pace = Pace(learning_rate, max(self.steps, 1))
        plan = jc.plan(lab.shapes, stage.rules)
        key = stage.train, stage.every, stage.host, tuple(plan.items())
        self.compiled = lab.once(key, lambda: Compiled(stage, plan, lab))
        self.step = self.compiled.step

    def begin(self, params: PyTree, key: jax.Array) -> tuple[State, PyTree]:
        """The state to train, and what is held, from dense parameters. Nothing is shared with ``params``."""
        if self.stage.train in ("project", "simulate"):
            return self._state(jax.tree.map(jnp.copy, params)), key
        trained, rest = jc.split(self.compiled.compress(params, key, self.steps))
        return self._state(widened(trained)), (dtypes_of(trained), rest)

    def _state(self, params: PyTree) -> State:
        return State(params, self.compiled.init(params, self.pace), jnp.zeros((), jnp.int32))

    def finish(self, state: State, held: PyTree, key: jax.Array) -> PyTree:
        """The compressed parameters in storage form."""
        if self.stage.train == "project":
            return jc.finalize(jc.nodes(state.params, state.opt_state))
        if self.stage.train == "simulate":
            return jc.finalize(self.compiled.compress(state.params, key, self.steps))
        dtypes, rest = held
        return jc.finalize(jc.merge(narrowed(state.params, dtypes), rest))


class Compiled:
    """The functions of a stage: ``compress(params, key, step)``, ``init(params, pace)`` and ``step``."""

    def __init__(self, stage: Stage, plan: jc.Plan, lab: Lab) -> None:
        def compress(params: PyTree, key: jax.Array, step: jax.Array) -> PyTree:
            return jc.compress(params, plan, step=step, key=key)

        def projected(pace: Pace) -> optax.GradientTransformation:
            draws = any("key" in getattr(method, "needs", ()) for method in plan.values())
            link = jc.project(plan, every=stage.every, key=jax.random.key(0) if draws else None)
            return optax.chain(optax.adam(pace), link)

        def simulated(params: PyTree, key: jax.Array, step: jax.Array) -> PyTree:
            return jc.simulate(params, plan, step=step, key=key)

        self.compress = compress if stage.host else jax.jit(compress)
        self.init: Callable[..., PyTree] = lambda params, pace: optax.adam(pace).init(params)
        if stage.train == "project":
            # It compresses, which is slow outside jit.
            self.init = jax.jit(lambda params, pace: projected(pace).init(params))
            self.step = make_step(lab.apply, projected)
        elif stage.train == "simulate":
            self.step = make_step(lab.apply, optax.adam, simulated)
        else:
            self.step = lab.once("nodes", lambda: make_step(lab.apply, optax.adam, _of_nodes))


def _of_nodes(params: PyTree, held: PyTree, step: jax.Array) -> PyTree:
    dtypes, rest = held
    return jc.materialize(jc.merge(narrowed(params, dtypes), rest))


def dtypes_of(tree: PyTree) -> PyTree:
    """Empty arrays that carry the dtypes of ``tree``, since a dtype is no leaf."""
    return jax.tree.map(lambda x: jnp.zeros((0,), x.dtype), tree)


def widened(tree: PyTree) -> PyTree:
    """Float32 copies: what is stored in 16 bits is trained in 32, or small updates would be rounded away."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32)), tree)


def narrowed(tree: PyTree, dtypes: PyTree) -> PyTree:
    return jax.tree.map(lambda x, like: x.astype(like.dtype), tree, dtypes)


# ---- One model, and the whole experiment -----------------------------------------------------------------------------


class Job(Lab):
    """One model of a config, with its folder of stored networks.

    Args:
      model: its name.
      config: what to measure.
      load: ``load(seed) -> Data``.
      workdir: the folder of the run.
      signals: to stop at, within training.
    """

    def __init__(
        self, model: str, config: Config, load: Callable[[int], datasets.Data], workdir: Path, signals: Signals
    ) -> None:
        super().__init__(model, load, config.model_options.get(model))
        self.config, self.workdir = config, workdir
        examples = len(self.load(0).train)
        self.steps = steps_in(config.epochs, examples, config.batch_size)
        self.extra = steps_in(config.finetune_epochs, examples, config.batch_size)
        self.checkpoint = Checkpoint(workdir / "checkpoint" / "state.jc", signals, config.checkpoint_seconds)
        self._jitted = jax.jit(self.apply)

    def programs(self, stages: Callable[[PyTree, int], list[Stage]]) -> list[Program]:
        """The stages of a way, ready to run."""

        def build() -> list[Program]:
            rate = self.config.finetune_learning_rate
            try:
                return [Program(stage, self, self.extra, rate) for stage in stages(self.shapes, self.extra)]
            except ValueError as error:
                raise ValueError(f"{self.name}, way {stages.__name__}: {error}") from None

        return self.once(stages, build)

    def dense_program(self) -> Program:
        """Training from fresh parameters."""
        return self.once(DENSE, lambda: Program(Stage([]), self, self.steps, self.config.learning_rate))

    def path(self, seed: int, way: str) -> Path:
        """Where a network is stored."""
        return self.workdir / "models" / f"{self.name}-seed{seed}-{way}.jc"

    def follow(self, way: str, programs: Sequence[Program], seed: int) -> PyTree:
        """Run all stages of a way, from its checkpoint if it was interrupted.

        Raises:
          Interrupted: at a signal; calling it again continues.
        """
        where = {"model": self.name, "seed": seed, "plan": way}
        first, leaves, tree = 0, None, None
        if (found := self.checkpoint.stage(where)) is not None:
            first, dense, leaves = found
        else:
            dense = self.start(seed) if way == DENSE.name else load(self.path(seed, DENSE.name))
        for number, program in list(enumerate(programs))[first:]:
            # The keys of stages differ; a way's own name does not matter, so all ways see the same batches.
            key = jax.random.fold_in(jax.random.key(seed), 1 + number + 100 * (way != DENSE.name))
            state, held = program.begin(dense, key)
            if leaves is not None:
                state, leaves = jax.tree.unflatten(jax.tree.structure(state), leaves), None
            with self.checkpoint.signals.deferred():
                state = fit(
                    program.step,
                    state,
                    held,
                    self.load(seed).train,
                    steps=program.steps,
                    batch_size=self.config.batch_size,
                    key=key,
                    pace=program.pace,
                    title=f"{self.name} seed {seed} {way}",
                    after=self.checkpoint.after({**where, "stage": number}, dense),
                )
            tree = program.finish(state, held, key)
            dense = jc.materialize(tree)
        return tree

    def measured(self, way: Way, seed: int) -> Row:
        """Follow a way, store the network, load what was stored and measure that: accuracy, bytes, multiply-adds."""
        path, config = self.path(seed, way.name), self.config
        options = {"data_options": config.data_options, "model_options": config.model_options.get(self.name, {})}
        about = {"data": config.data, "model": self.name, "seed": seed, "plan": way.name}
        path.parent.mkdir(exist_ok=True)
        save(path, way.make(self, seed), metadata=about | {k: dict(v) for k, v in options.items() if v})
        tree, data = load(path), self.load(seed)
        params = jc.materialize(tree)
        dense_cost = self.once("cost", lambda: cost.multiply_adds(self.module, params, data.test.x))
        test, row = self.evaluate(params, data.test), {}
        if len(data.val):
            found = self.evaluate(params, data.val)
            row = {"validation_accuracy": found.accuracy, "validation_bits": found.bits}
        return row | {
            "accuracy": test.accuracy,
            "correct": test.correct,
            "total": test.total,
            "bits_per_byte": test.bits if data.kind == "text" else None,
            "bytes": path.stat().st_size,
            "ratio": self.path(seed, DENSE.name).stat().st_size / path.stat().st_size,
            "multiply_adds": round(cost.compressed_multiply_adds(tree, dense_cost)),
            "latency": self.latency(params, data) if way in (DENSE, BASELINE) else None,
            "file": str(path.relative_to(self.workdir)),
        }

    def latency(self, params: PyTree, data: datasets.Data) -> list[float]:
        """Median, 10th and 90th percentile of the seconds of one batch."""
        found = measure.latency(self._jitted, params, jnp.asarray(data.test.x[: self.config.latency_batch]))
        return [found.median, found.low, found.high]


class Compression:
    """All models, seeds and ways of one config, as the runner takes them.

    Raises:
      ValueError: for anything wrong with the config or the data. Nothing was trained then.
    """

    keys = ("model", "seed", "plan")

    def __init__(self, config: Config, data_dir: str | None, workdir: str | None, signals: Signals) -> None:
        for name in ("seeds", "epochs", "finetune_epochs", "batch_size", "learning_rate", "finetune_learning_rate"):
            if not getattr(config, name) > 0:
                raise ValueError(f"config.{name}={getattr(config, name)} must be positive")
        self.config, self.workdir = config, Path(workdir or f"runs/{config.name}")
        self.ways = {way.name: way for way in (DENSE, BASELINE, *runner.chosen(config.ways, config.only))}
        load = functools.partial(datasets.of, config.data, data_dir, config.data_options)
        self.jobs = {name: Job(name, config, load, self.workdir, signals) for name in config.models}
        self.about = str(load(0))
        skipped = ("name", "ways", "only", "seeds", "models", "checkpoint_seconds", "latency_batch")
        self.setting = {
            "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in skipped},
            "data": self.about,
            "checksum": load(0).checksum(),
            "ways": {f"{job.name} {way.name}": way.told(job) for job in self.jobs.values() for way in config.ways},
        }

    def todo(self) -> Iterator[Row]:
        for model in self.jobs:
            for seed in range(self.config.seeds):
                for way in self.ways:
                    yield {"model": model, "seed": seed, "plan": way}

    def measure(self, rows: Rows, model: str, seed: int, plan: str) -> Row:
        row = self.jobs[model].measured(self.ways[plan], seed)
        self.jobs[model].checkpoint.path.unlink(missing_ok=True)
        return row

    def line(self, row: Row) -> str:
        return tables.line(row)

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        text = tables.finish(rows, self.workdir / "table.md", self.workdir / "pareto.png", self.about)
        write(self.workdir / "table.txt", text + "\n")
        return text, tables.summarize(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(__doc__, "runs/<name of the config>")
    args, config = flags.parse(parser, config_of, argv)
    return runner.main(lambda signals: Compression(config, args.data_dir, args.workdir, signals), args.overwrite)


if __name__ == "__main__":
    from experiments import compress  # the module that configs import, not a second copy of it

    sys.exit(compress.main())
