"""Training step: dense adamw against the same step with ``project`` or ``simulate``.

    python -m experiments.benchmarks.train_step

Each side keeps its own parameters and optimizer state, donated from step to step. Where jaxpruner can be imported,
its mask update is timed beside ours.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jcompress as jc
from experiments.benchmarks import timing

NEVER = 1 << 30
Side = tuple[str, Callable[[], Any], str]


@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters, a batch, and the mean cross-entropy of one on the other."""

    name: str
    params: dict
    batch: tuple
    loss: Callable

    @property
    def size(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.params))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def kernel(key: jax.Array, rows: int, columns: int) -> jax.Array:
    return jax.random.normal(key, (rows, columns)) / rows**0.5


def mlp(widths: list[int], batch: int) -> Model:
    keys = iter(jax.random.split(jax.random.key(0), len(widths) + 1))
    params = {
        f"layer{i}": {"kernel": kernel(next(keys), m, n), "bias": jnp.zeros(n)}
        for i, (m, n) in enumerate(itertools.pairwise(widths))
    }

    def loss(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
        *hidden, last = params.values()
        for layer in hidden:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return cross_entropy(x @ last["kernel"] + last["bias"], y)

    x = jax.random.normal(next(keys), (batch, widths[0]))
    y = jax.random.randint(next(keys), (batch,), 0, widths[-1])
    return Model("MLP", params, (x, y), loss)


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def attention(block: dict, x: jax.Array, heads: int) -> jax.Array:
    batch, length, width = x.shape
    qkv = (x @ block["qkv"]["kernel"]).reshape(batch, length, 3, heads, width // heads)
    mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True)
    return mixed.reshape(batch, length, width) @ block["out"]["kernel"]


def transformer(width: int, depth: int, heads: int, batch: int, length: int) -> Model:
    """A byte-level decoder with learned positions and tied embeddings."""
    keys = iter(jax.random.split(jax.random.key(0), 4 * depth + 3))
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}

    def block() -> dict:
        kernels = {name: {"kernel": kernel(next(keys), *shape)} for name, shape in shapes.items()}
        return {**kernels, "norm1": jnp.ones(width), "norm2": jnp.ones(width)}

    params = {
        "embed": 0.02 * jax.random.normal(next(keys), (256, width)),
        "position": 0.02 * jax.random.normal(next(keys), (length, width)),
        "block": [block() for _ in range(depth)],
        "norm": jnp.ones(width),
    }

    def loss(params: dict, tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens[:, :-1]] + params["position"]
        for block in params["block"]:
            x = x + attention(block, norm(x, block["norm1"]), heads)
            x = x + jax.nn.gelu(norm(x, block["norm2"]) @ block["up"]["kernel"]) @ block["down"]["kernel"]
        return cross_entropy(norm(x, params["norm"]) @ params["embed"].T, tokens[:, 1:])

    tokens = jax.random.randint(next(keys), (batch, length + 1), 0, 256)
    return Model("transformer", params, (tokens,), loss)


class Trainer:
    """One side of a comparison: a jitted step on a state of its own; calling it takes one step."""

    def __init__(self, model: Model, tx: optax.GradientTransformation, view: Callable = lambda params: params) -> None:
        self.params = jax.tree.map(jnp.copy, model.params)
        self.state = jax.jit(tx.init)(self.params)
        self.batch = model.batch

        def step(params: Any, state: Any, *batch: jax.Array) -> tuple:
            value, grads = jax.value_and_grad(lambda p: model.loss(view(p), *batch))(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        self.step = jax.jit(step, donate_argnums=(0, 1))

    def __call__(self) -> jax.Array:
        self.params, self.state, value = self.step(self.params, self.state, *self.batch)
        return value


def adamw() -> optax.GradientTransformation:
    return optax.adamw(1e-4)


def projected(model: Model, method: Any, every: int) -> Trainer:
    plan = jc.plan(model.params, [(".*kernel", method)])
    return Trainer(model, optax.chain(adamw(), jc.project(plan, every=every)))


def wrapped(model: Model, method: Any, every: int) -> Trainer:
    plan = jc.plan(model.params, [(".*kernel", method)])
    return Trainer(model, jc.project(plan, every=every, inner=adamw()))


def simulated(model: Model) -> Trainer:
    plan = jc.plan(model.params, [(".*kernel", jc.quantize.Int(bits=8))])
    return Trainer(model, adamw(), lambda params: jc.simulate(params, plan))


class Peer(Trainer):
    """jaxpruner's magnitude pruning with a mask update at every step: its optimizer wrapper, then its own hook."""

    def __init__(self, model: Model, sparsity: float) -> None:
        import jaxpruner

        if not hasattr(jax, "tree_map"):  # jaxpruner calls it, jax has it no more
            jax.tree_map = jax.tree.map
        pruner = jaxpruner.MagnitudePruning(
            sparsity_distribution_fn=functools.partial(jaxpruner.sparsity_distributions.uniform, sparsity=sparsity),
            scheduler=jaxpruner.sparsity_schedules.PeriodicSchedule(
                update_freq=1, update_start_step=0, update_end_step=NEVER
            ),
        )
        super().__init__(model, pruner.wrap_optax(adamw()))
        inner = self.step

        def step(params: Any, state: Any, *batch: jax.Array) -> tuple:
            params, state, value = inner(params, state, *batch)
            return pruner.post_gradient_update(params, state), state, value

        self.step = jax.jit(step, donate_argnums=(0, 1))


def peer(model: Model, sparsity: float) -> Trainer | None:
    try:
        return Peer(model, sparsity)
    except (ImportError, AttributeError) as error:
        print(f"no row for jaxpruner: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def run(
    name: str,
    doc: str | None,
    argv: Sequence[str] | None,
    sides: Callable[[Model, Any], Iterable[Side]],
    options: Mapping[str, tuple[Any, str]],
    pairs: int = 31,
) -> None:
    """A benchmark of training steps on the MLP and the transformer, each against dense adamw.

    Args:
      name: of the benchmark.
      doc: its docstring, for the help.
      argv: the command line.
      sides: ``sides(model, args)``, the rows of a model: name, how to build the side, target of the ratio.
      options: more flags, as for :func:`timing.run`.
      pairs: how often the two sides take turns by default.
    """

    def cases(args: Any) -> Iterator[timing.Case]:
        models = {
            "mlp": lambda: mlp(args.widths, args.batch),
            "transformer": lambda: transformer(args.width, args.depth, args.heads, args.texts, args.length),
        }
        for model in (models[each]() for each in args.models):
            for label, make, target in sides(model, args):
                title = f"{model.name} {model.size / 1e6:.1f}M: {label}"
                yield timing.Case(title, "dense", "with", functools.partial(_against_dense, model, make), target)

    timing.run(name, doc, cases, {**MODELS, **options}, argv, pairs=pairs)


def _against_dense(model: Model, make: Callable[[], Any]) -> tuple | None:
    side = make()
    return None if side is None else (Trainer(model, adamw()), side)


MODELS = {
    "models": (timing.Names(("mlp", "transformer")), "which of them"),
    "widths": ([784, 1024, 2048, 1024, 10], "of the MLP"),
    "batch": (128, "of the MLP"),
    "width": (384, "of the transformer"),
    "depth": (8, "of the transformer"),
    "heads": (6, "of the transformer"),
    "length": (128, "of a text, in bytes"),
    "texts": (8, "in a batch of the transformer"),
}


def bound(model: Model, of_mlp: float, of_transformer: float) -> str:
    """The target of a ratio, which depends on the model."""
    return f"<= {of_mlp if model.name == 'MLP' else of_transformer:.2f}"


SPARSITY = {"sparsity": (0.9, "fraction of zeros")}


def _sides(model: Model, args: Any) -> list[Side]:
    sparsity, update = args.sparsity, bound(model, 4, 1.3)
    leaf, whole = (jc.prune.Magnitude(sparsity=sparsity, scope=scope) for scope in ("leaf", "global"))
    return [
        ("dense again", lambda: Trainer(model, adamw()), ""),
        ("project(inner=), no update due", lambda: wrapped(model, leaf, NEVER), "<= 1.05"),
        ("project, no update due", lambda: projected(model, leaf, NEVER), "<= 1.05"),
        ("simulate, 8 bits per channel", lambda: simulated(model), "<= 1.10"),
        ("mask update, per leaf", lambda: projected(model, leaf, 1), update),
        ("mask update, inner=", lambda: wrapped(model, leaf, 1), update),
        ("mask update, global", lambda: projected(model, whole, 1), update),
        ("mask update, jaxpruner", lambda: peer(model, sparsity), ""),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    run("train_step", __doc__, argv, _sides, SPARSITY)


if __name__ == "__main__":
    main()
