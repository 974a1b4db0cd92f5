"""Calibration of a transformer, against its plain forward passes plus the Gram products computed alone.

    python -m experiments.benchmarks.calibration

The Gram products alone are one ``x^T x`` for each distinct activation that meets a kernel, of random data in the same
shapes: queries, keys and values share one. Every side sums its result into a state that it donates. Memory is what
the compiled update needs, and what the process holds on its devices after 4 and after 16 batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jcompress as jc
from experiments.benchmarks import timing
from experiments.benchmarks.train_step import Model, transformer
from jcompress.trace import Calibration, observe


class Passes:
    """One side: a jitted ``update(state, *args)`` with a state of its own, called once for each batch."""

    def __init__(self, fn: Callable, args: tuple, batches: int) -> None:
        shapes = jax.eval_shape(lambda *args: fn(None, *args), *args)
        self.state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        self.update = jax.jit(fn, donate_argnums=0)
        self.args, self.batches = args, batches

    def __call__(self) -> Any:
        for _ in range(self.batches):
            self.state = self.update(self.state, *self.args)
        return self.state

    def memory(self) -> tuple[int, int]:
        """Bytes of temporaries of the compiled update, and of its state."""
        found = self.update.lower(self.state, *self.args).compile().memory_analysis()
        return found.temp_size_in_bytes, sum(x.nbytes for x in jax.tree.leaves(self.state))


def forward(model: Model) -> Callable:
    """The plain pass; the loss is kept so that nothing is left out."""
    return lambda state, params, *batch: model.loss(params, *batch) + (0 if state is None else state)


def calibration(model: Model, names: tuple[str, ...]) -> Callable:
    def update(state: Calibration | None, params: Any, *batch: jax.Array) -> Calibration:
        found = observe(model.loss, params, *batch, statistics=names)[1]
        return found if state is None else state.merge(found)

    return update


def both(model: Model, xs: list[jax.Array]) -> tuple[Callable, tuple]:
    """The plain pass and the Gram products of ``xs``, in one program."""

    def update(state: Any, xs: list[jax.Array], params: Any, *batch: jax.Array) -> Any:
        wide = [x.astype(jnp.float32) for x in xs]
        grams = [jax.lax.dot(x.T, x, precision=jax.lax.Precision.HIGHEST) for x in wide]
        found = (model.loss(params, *batch), grams)
        return found if state is None else jax.tree.map(jnp.add, state, found)

    return update, (xs, model.params, *model.batch)


def activations(model: Model) -> list[jax.Array]:
    """Random data in the shape of each distinct activation that meets a kernel: four a block, and the head's."""
    positions = model.batch[0].shape[0] * (model.batch[0].shape[1] - 1)
    kernels = [block[name]["kernel"] for block in model.params["block"] for name in ("qkv", "out", "up", "down")]
    keys = iter(jax.random.split(jax.random.key(1), len(kernels) + 1))
    return [jax.random.normal(next(keys), (positions, w.shape[0])) for w in (*kernels, model.params["embed"].T)]


def live_bytes() -> int:
    return sum(x.nbytes for x in jax.live_arrays())


def after(model: Model, names: tuple[str, ...], batches: int) -> int:
    """Bytes that a calibration of so many batches leaves on the device."""
    before = live_bytes()
    stats = jc.calibrate(model.loss, model.params, (model.batch for _ in range(batches)), statistics=names)
    jax.block_until_ready(stats)
    return live_bytes() - before


def main(argv: list[str] | None = None) -> None:
    parser = timing.parser(__doc__, pairs=7)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="of a text, in bytes")
    parser.add_argument("--texts", type=int, default=8, help="in a batch")
    parser.add_argument("--batches", type=int, default=4, help="in one timed calibration")
    args = parser.parse_args(argv)
    model = transformer(args.width, args.depth, args.heads, args.texts, args.length)
    start = time.perf_counter()
    jax.make_jaxpr(lambda *a: observe(model.loss, *a))(model.params, *model.batch)
    traced = time.perf_counter() - start
    plain = Passes(forward(model), (model.params, *model.batch), args.batches)
    alone = Passes(*both(model, activations(model)), args.batches)
    rows = []
    for label, names, target in [
        ("Gram matrices", ("gram",), "<= 1.5"),
        ("all defaults", ("gram", "count", "sum", "absmax", "norm", "zeros", "outputs", "counts"), ""),
    ]:
        ours = Passes(calibration(model, names), (model.params, *model.batch), args.batches)
        temporaries, state = ours.memory()
        times = timing.paired(alone, ours, args.pairs)
        rows.append(
            timing.row(
                f"{label}, {args.depth} layers of {args.width}", ("forward + Gram", times[0]), ("calibrate", times[1]),
                target, temporaries=temporaries, state=state, left_after_4=after(model, names, 4),
                left_after_16=after(model, names, 16), trace_s=traced,
            )
        )  # fmt: skip
    times = timing.paired(plain, alone, args.pairs)
    rows.append(timing.row("Gram products alone", ("forward", times[0]), ("forward + Gram", times[1])))
    timing.finish("calibration", rows, args.out, **{k: v for k, v in vars(args).items() if k != "out"})
    for r in rows[:2]:
        told = {k: f"{v / 1e6:.1f} MB" for k, v in r.extra.items() if k != "trace_s"}
        print(f"{r.name}: {told}, traced in {traced:.2f} s")


if __name__ == "__main__":
    main()
