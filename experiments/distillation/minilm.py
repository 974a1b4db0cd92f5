"""A sentence encoder with half of its layers, taught by the whole one on sentences without labels, then compressed.

Examples:
  python -m experiments.distillation.minilm --model_dir=<folder with model.safetensors>
    --data_dir=<folder with sentences.txt and sts2015_images.tsv>

Rows, in order: the dense encoder; three of its six layers, cut out and not trained (the control); the same three layers
taught; and these compressed, then taught once more: what their nodes let train, or the kernels themselves, rounded in
the forward pass as they will be stored. It writes to ``--workdir`` the rows, ``table.md``, ``pareto.png``,
``record.json`` and the models. Interrupted, the same command continues.

Expect from the literature: a student of half of BERT's layers that starts from them keeps about 97% of its scores (Sanh
et al. 2019, arXiv:1910.01108).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jcompress as jc
from experiments import flags, pictures, runner, tables
from experiments.compress import dtypes_of, narrowed, widened
from experiments.models import minilm
from experiments.quantization import recipes, sts
from experiments.workdir import Row, Rows, write
from jcompress.io import load, save

PyTree = Any
KERNELS, TABLES, PLACES = "layer_.*/kernel", "embeddings/token/embedding", "embeddings/position/embedding"
HALF = jc.quantize.Float("float16")


@dataclasses.dataclass(frozen=True)
class Config:
    """Fork it, or change a value with ``--config.<name>=<value>``."""

    name: str = "distil_minilm"
    layers: tuple[int, ...] = (1, 3, 5)  # of the teacher, that the student starts from
    matched: tuple[int, ...] = (2, 4, 6)  # the teacher's states that the student's layers are to give
    sets: tuple[str, ...] = ("images", "headlines")
    sentences: int = 100_000  # at most so many
    longest: int = 48  # tokens of a sentence
    batch_size: int = 64
    epochs: float = 3.0  # of the student
    learning_rate: float = 5e-4
    finetuning: float = 0.5  # epochs after compression
    finetuning_rate: float = 3e-3  # in root mean squares of each array
    states: float = 1.0  # weight of the relative squared error of the layers' states
    relations: float = 10.0  # weight of the squared error of similarities between sentences
    calibration: int = 1024  # sentences for statistics
    validation: int = 300  # pairs nobody judged, for choices
    seed: int = 0
    only: str = ""  # some of the compressed rows, joined by commas


def kernels(bits: int) -> Any:
    """GPTQ on an affine grid, its scales in 16 bits."""
    return jc.chain(jc.quantize.GPTQ(bits=bits, group_size=64, symmetric=False, clip="mse", order=True), HALF)


def words(clusters: int, block: int) -> Any:
    """A table of vectors from one codebook."""
    return jc.chain(jc.share.KMeans(clusters=clusters, block=(1, block), iterations=12), HALF)


def by_use(step: float) -> Any:
    """A table whose rows have steps by how often they are read; of the others a tenth of the mean is taken."""
    return jc.quantize.WaterFilling(step, weigh="counts", states=4, damping=0.1)


def grid(bits: int) -> Any:
    """A table on affine grids along the vocabulary."""
    return jc.chain(jc.quantize.Int(bits=bits, group_size=128, symmetric=False, clip="mse", pad=True), HALF)


def seen(bits: int) -> Any:
    """An affine grid for kernels that train as they will be stored."""
    return jc.chain(jc.quantize.Int(bits=bits, group_size=64, symmetric=False), HALF)


def walks(bits: int) -> Any:
    """Kernels as walks through a trellis, inputs rotated, for the outputs."""
    return jc.chain(jc.quantize.Rotation(jc.quantize.Trellis(bits=bits, block=(2, 128), weigh="gram")), HALF)


class Way(NamedTuple):
    """The methods of kernels, of the table of words and of that of places; all else takes 16 bits.

    Attributes:
      kernels: one from statistics, whose scales are taught; or with ``simulated`` one that the teaching looks through.
      words: its vectors are taught, the codes are not.
      simulated: whether the kernels themselves are taught, and rounded at the end.
      places: as ``words``.
    """

    kernels: Any
    words: Any
    simulated: bool = False
    places: Any = grid(8)


WAYS: dict[str, Way] = {
    "3 bits and words": Way(kernels(3), words(256, 8)),
    "3 bits in training and words": Way(seen(3), words(512, 8), simulated=True),
    "2 bits in training and words": Way(seen(2), words(512, 8), simulated=True),
    "2 bits on a trellis and words": Way(walks(2), words(384, 8), places=words(256, 4)),
    "2 bits on a trellis and words by use": Way(walks(2), by_use(1.0), places=words(256, 4)),
    "4 bits": Way(kernels(4), grid(4)),
}

Batch = tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...], np.ndarray]


class Lessons:
    """Sentences, and what the teacher makes of them: the states of some layers in 16 bits, and the embeddings."""

    def __init__(self, encoder: minilm.Encoder, teacher: PyTree, tokens: sts.Tokens, config: Config) -> None:
        self.size, self.parts = config.batch_size, []

        @jax.jit
        def taught(x: jax.Array, mask: jax.Array) -> tuple:
            found = encoder.states(teacher, x, mask)
            return tuple(found[i].astype(jnp.float16) for i in config.matched), encoder.pool(found[-1], mask)

        groups: dict[int, list] = {}
        for ids in tokens:
            cut = ids if len(ids) <= config.longest else [*ids[: config.longest - 1], ids[-1]]
            groups.setdefault(next(n for n in minilm.LENGTHS if n >= len(cut)), []).append(cut)
        for length, members in sorted(groups.items()):
            whole = len(members) // self.size * self.size
            x, mask = minilm.pad(members[:whole], length) if whole else (np.zeros((0, length)), None)
            starts = tqdm(range(0, whole, self.size), unit="batch", desc=f"teacher, {length} tokens", disable=None)
            found = [jax.device_get(taught(x[i : i + self.size], mask[i : i + self.size])) for i in starts]
            if found:
                states, ends = zip(*found, strict=True)
                layers = tuple(np.concatenate(layer) for layer in zip(*states, strict=True))
                self.parts.append((x, mask, layers, np.concatenate(ends)))

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return sum(len(x) // self.size for x, *_ in self.parts)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Batches of sentences of like length, in a new order each epoch, without end."""
        rng = np.random.default_rng(seed)
        while True:
            orders = [rng.permutation(len(x)) for x, *_ in self.parts]
            starts = [(p, i) for p, x in enumerate(orders) for i in range(0, len(x), self.size)]
            for p, i in rng.permutation(starts):
                x, mask, layers, ends = self.parts[p]
                rows = np.sort(orders[p][i : i + self.size])
                yield x[rows], mask[rows], tuple(layer[rows] for layer in layers), ends[rows]


def learn(
    encoder: minilm.Encoder,
    tree: PyTree,
    lessons: Lessons,
    config: Config,
    steps: int,
    tx: optax.GradientTransformation,
    seed: int,
    plan: Any = None,
) -> PyTree:
    """All that trains in a tree of arrays or nodes, taught for some steps; what a plan names is simulated meanwhile.

    The loss: a cosine for the embeddings, how sentences relate (Park et al. 2019, arXiv:1904.05068), and the states of
    every layer (Jiao et al. 2020, arXiv:1909.10351).
    """
    train, held = jc.split(tree)
    dtypes = dtypes_of(train)
    train = widened(train)  # Adam's epsilon is nothing in 16 bits

    def loss(train: PyTree, held: PyTree, batch: Batch) -> jax.Array:
        x, mask, states, ends = batch
        params = jc.materialize(jc.merge(narrowed(train, dtypes), held))
        found = encoder.states(params if plan is None else jc.simulate(params, plan), x, mask)
        own = encoder.pool(found[-1], mask)
        pairs = zip(found[1:], (state.astype(jnp.float32) for state in states), strict=True)
        errors = [jnp.square(a - b).sum() / jnp.square(b).sum() for a, b in pairs]
        relations = jnp.square(own @ own.T - ends @ ends.T).mean()
        cosine = 1 - jnp.sum(own * ends, -1).mean()
        return cosine + config.states * sum(errors) / len(errors) + config.relations * relations

    @jax.jit
    def step(train: PyTree, state: Any, held: PyTree, batch: Batch) -> tuple:
        value, grads = jax.value_and_grad(loss)(train, held, batch)
        updates, state = tx.update(grads, state, train)
        return optax.apply_updates(train, updates), state, value

    state, batches, mean = tx.init(train), lessons.batches(seed), 0.0
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for number in range(steps):
            train, state, value = step(train, state, held, next(batches))
            mean = float(value) if number == 0 else 0.98 * mean + 0.02 * float(value)
            bar.update()
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
    return jc.merge(narrowed(train, dtypes), held)


class Halving:
    """All rows, as the runner takes them."""

    keys = ("name",)

    def __init__(self, config: Config, model_dir: str, data_dir: str, workdir: str | None) -> None:
        self.config, self.workdir = config, Path(workdir or f"runs/{config.name}")
        self.encoder, self.teacher = minilm.load(model_dir)
        sets = {name: sts.read(Path(data_dir) / f"sts2015_{name}.tsv", self.encoder) for name in config.sets}
        self.labelled, self.validation = sts.labelled(sets), sts.unlabelled(sets)
        self.validation = self.validation.where(np.arange(len(self.validation)) < config.validation)
        lines = (Path(data_dir) / "sentences.txt").read_text(encoding="utf-8").splitlines()
        self.tokens = self.encoder.tokens(lines[: config.sentences])
        known = list(WAYS)
        self.ways = [x for x in known if not config.only or x in config.only.split(",")]
        self.judge = sts.Judge(self.encoder)
        self._kept: dict[str, Any] = {}
        setting = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("name", "only")}
        self.setting = {"config": setting, "ways": {name: runner.describe(WAYS[name]) for name in known}}

    def todo(self) -> Iterator[Row]:
        yield from ({"name": name} for name in ("dense", "cut", "taught", *self.ways))

    def measure(self, rows: Rows, name: str) -> Row:
        """Make, store, load what was stored, and judge that."""
        if name in WAYS:
            return self._made_small(name, WAYS[name])
        whole = {"dense": lambda: self.teacher, "cut": self._cut, "taught": self._student}[name]()
        return self._row("float32", name, self._stored(name, whole))

    def _made_small(self, name: str, way: Way) -> Row:
        rate = optax.cosine_decay_schedule(self.config.finetuning_rate, self._steps(self.config.finetuning))
        sized = optax.scale_by_param_block_rms(min_scale=1e-6)
        tx = optax.chain(optax.scale_by_adam(), sized, optax.scale_by_learning_rate(rate))
        tree, rounded = self._compressed(way)
        before = self._judged(jc.materialize(_rounded(tree, rounded)))
        tree = self._taught(tree, self.config.finetuning, tx, 1, rounded)
        stored = self._stored(name, _rounded(tree, rounded))
        return self._row("taught, compressed", name, stored) | {"before": before["mean"]}

    def _row(self, group: str, name: str, tree: PyTree) -> Row:
        size = self._path(name).stat().st_size
        dense = 4 * sum(x.size for x in jax.tree.leaves(self.teacher))
        row = {"group": group, "bytes": size, "ratio": dense / size}
        return row | self._judged(jc.materialize(tree))

    def _judged(self, params: PyTree) -> Row:
        row: Row = {key: sts.spearman(self.judge.pairs(params, x), x.scores) for key, x in self.labelled.items()}
        row["mean"] = float(np.mean(list(row.values())))
        theirs = self._once("validation", lambda: self.judge.pairs(self.teacher, self.validation))
        return row | {"validation": sts.agreement(self.judge.pairs(params, self.validation), theirs)}

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def _path(self, name: str) -> Path:
        return self.workdir / "models" / f"{name}.jc"

    def _stored(self, name: str, tree: PyTree) -> PyTree:
        path = self._path(name)
        path.parent.mkdir(exist_ok=True)
        save(path, tree, coded=name in WAYS)
        return load(path)

    def _cut(self) -> PyTree:
        chosen = {f"layer_{i}": self.teacher[f"layer_{layer}"] for i, layer in enumerate(self.config.layers)}
        return {"embeddings": self.teacher["embeddings"], **chosen}

    def _student(self) -> PyTree:
        if self._path("taught").exists():
            return load(self._path("taught"))
        config, steps = self.config, self._steps(self.config.epochs)
        rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, steps // 20 + 1, steps)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
        return self._taught(self._cut(), config.epochs, tx, 0)

    def _lessons(self) -> Lessons:
        return self._once("lessons", lambda: Lessons(self.encoder, self.teacher, self.tokens, self.config))

    def _steps(self, epochs: float) -> int:
        return max(round(epochs * self._lessons().steps), 1)

    def _taught(
        self, tree: PyTree, epochs: float, tx: optax.GradientTransformation, order: int, plan: Any = None
    ) -> PyTree:
        seed = 100 * self.config.seed + order
        return learn(self.encoder, tree, self._lessons(), self.config, self._steps(epochs), tx, seed, plan)

    def _compressed(self, way: Way) -> tuple[PyTree, Any]:
        """The student as it is taught, and the plan of what is rounded only after that."""
        student, key = self._student(), jax.random.key(self.config.seed)
        others = [(TABLES, way.words), (PLACES, way.places), (".*", HALF)]
        if way.simulated:
            later = jc.plan(student, [(KERNELS, way.kernels), (".*", None)])
            return jc.compress(student, jc.plan(student, [(KERNELS, None), *others]), key=key), later
        plan = jc.plan(student, [(KERNELS, way.kernels), *others])

        def gathered() -> Any:
            short = [ids for ids in self.tokens if len(ids) <= 24][: self.config.calibration]
            batches = [minilm.pad(short[i : i + 64], 24) for i in range(0, len(short), 64)]
            kernels_only = jc.plan(student, [(KERNELS, jc.quantize.GPTQ(bits=4)), (".*", None)])
            found = jc.calibrate(self.encoder, student, batches, kernels_only)
            return found.merge(recipes.words_read(student, [ids[: self.config.longest] for ids in self.tokens]))

        return jc.compress(student, plan, stats=self._once("stats", gathered), key=key), None

    def line(self, r: Row) -> str:
        return f"{r['name']:<26} {r['bytes']:>11,} bytes {r['ratio']:6.2f}x  mean {r['mean']:.4f}"

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        return finish(rows, self.workdir / "table.md", self.workdir / "pareto.png"), None


def _rounded(tree: PyTree, plan: Any) -> PyTree:
    """The tree with nodes for the arrays that a plan names."""
    if plan is None:
        return tree
    is_node = lambda x: isinstance(x, jc.core.Compressed)  # noqa: E731
    found = jc.compress(jc.materialize(tree), plan)
    return jax.tree.map(lambda old, new: new if is_node(new) else old, tree, found, is_leaf=is_node)


def finish(rows: Sequence[Row], table: Path, picture: Path) -> str:
    """Write the table, and the picture without rows of other seeds; return the table."""
    head = ["encoder", "bytes", "ratio", "mean Spearman", "before teaching", "cosine with the whole, validation"]
    shown = [head]
    for r in rows:
        before = f"{r['before']:.4f}" if "before" in r else ""
        name = f"3 layers, {r['name']}" if r["name"] != "dense" else "6 layers, dense"
        cosine = f"{r['validation']['cosine']:.4f}"
        shown.append([name, f"{r['bytes']:,}", f"{r['ratio']:.2f}", f"{r['mean']:.4f}", before, cosine])
    text = tables.markdown(shown)
    write(table, text + "\n")
    pictures.encoders([r for r in rows if not r.get("seed")], picture)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(__doc__, "runs/<name of the config>")
    parser.add_argument("--model_dir", required=True, help="a folder with the weights and the tokenizer of the encoder")
    args, config = flags.parse(parser, lambda data: Config(), argv)
    if args.data_dir is None:
        parser.error("--data_dir is required, a folder with sentences.txt and the pairs of sentences")
    return runner.main(lambda signals: Halving(config, args.model_dir, args.data_dir, args.workdir), args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
