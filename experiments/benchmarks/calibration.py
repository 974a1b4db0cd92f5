"""Calibration of a transformer, against its plain forward passes plus the Gram products computed alone.

    python -m experiments.benchmarks.calibration

The Gram products alone are one ``x^T x`` for each distinct activation that meets a kernel, of random data in the same
shapes: queries, keys and values share one. Every side sums its result into a state that it donates. Memory is what
the compiled update needs, and what the process holds on its devices after 4 and after 16 batches.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence
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


STATISTICS = {
    "Gram matrices": ("gram",),
    "all defaults": ("gram", "count", "sum", "absmax", "norm", "zeros", "outputs", "counts"),
}


def cases(args: argparse.Namespace) -> Iterator[timing.Case]:
    model = transformer(args.width, args.depth, args.heads, args.texts, args.length)
    for label, names in STATISTICS.items():
        title, target = f"{label}, {args.depth} layers of {args.width}", "<= 1.5" if label == "Gram matrices" else ""
        make = functools.partial(sides, model, names, args.batches)
        yield timing.Case(title, "forward + Gram", "calibrate", make, target)
    make = functools.partial(plain_sides, model, args.batches)
    yield timing.Case("Gram products alone", "forward", "forward + Gram", make)


def sides(model: Model, names: tuple[str, ...], batches: int) -> tuple:
    """The passes with the Gram products alone, and calibration with what it takes."""
    alone = Passes(*both(model, activations(model)), batches)
    ours = Passes(calibration(model, names), (model.params, *model.batch), batches)
    temporaries, state = ours.memory()
    extra = {"temporaries": temporaries, "state": state}
    return alone, ours, extra | {f"left_after_{n}": after(model, names, n) for n in (4, 16)}


def plain_sides(model: Model, batches: int) -> tuple:
    plain = Passes(forward(model), (model.params, *model.batch), batches)
    return plain, Passes(*both(model, activations(model)), batches)


def traced(args: argparse.Namespace) -> dict[str, float]:
    """Seconds to trace the pass that gathers statistics."""
    model = transformer(args.width, args.depth, args.heads, args.texts, args.length)
    start = time.perf_counter()
    jax.make_jaxpr(lambda *a: observe(model.loss, *a))(model.params, *model.batch)
    return {"trace_s": time.perf_counter() - start}


def main(argv: Sequence[str] | None = None) -> None:
    options = {
        "width": (128, "of the transformer"),
        "depth": (12, "of the transformer"),
        "heads": (4, "of the transformer"),
        "length": (128, "of a text, in bytes"),
        "texts": (8, "in a batch"),
        "batches": (4, "in one timed calibration"),
    }
    for r in timing.run("calibration", __doc__, cases, options, argv, pairs=7, about=traced):
        if r.extra:
            print(f"{r.name}: { ({k: f'{v / 1e6:.1f} MB' for k, v in r.extra.items()}) }")


if __name__ == "__main__":
    main()
