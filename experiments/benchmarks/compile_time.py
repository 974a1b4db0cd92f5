"""Compile time of a training step: adamw alone against the same step with a plan, for few and for many leaves.

    python -m experiments.benchmarks.compile_time

What is timed is lowering and compiling, a function anew each time, on 8, 32 and 96 equal matrices and on a transformer,
where a plan has four shapes to serve. Nothing is run. ``compress`` is compiled by itself, without a step around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jcompress as jc
from experiments.benchmarks import timing
from experiments.benchmarks.train_step import Model, kernel, transformer

KERNELS = ".*kernel"
Build = Callable[[], Any]


def equal_matrices(number: int, width: int) -> Model:
    """A chain of square matrices, all of one shape."""
    keys = jax.random.split(jax.random.key(0), number)
    params = {f"layer{i}": {"kernel": kernel(key, width, width)} for i, key in enumerate(keys)}

    def loss(params: dict, x: jax.Array) -> jax.Array:
        for layer in params.values():
            x = jnp.tanh(x @ layer["kernel"])
        return jnp.square(x).mean()

    return Model(f"{number} equal matrices", params, (jnp.ones((8, width)),), loss)


def compiled(model: Model, tx: optax.GradientTransformation, view: Callable = lambda params: params) -> Build:
    """A side: to lower and compile a step of this optimizer, anew at each call."""
    state = jax.eval_shape(tx.init, model.params)

    def build() -> None:
        def step(params: Any, state: Any, *batch: jax.Array) -> tuple:
            grads = jax.grad(lambda p: model.loss(view(p), *batch))(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        jax.jit(step, donate_argnums=(0, 1)).lower(model.params, state, *model.batch).compile()

    return build


def compressing(model: Model, plan: jc.Plan) -> Build:
    """A side: to lower and compile ``compress`` alone."""
    return lambda: jax.jit(lambda params: jc.compress(params, plan)).lower(model.params).compile() and None


def sides(model: Model, sparsity: float) -> dict[str, Callable[[], Build]]:
    """What is compiled besides adamw alone, by name."""
    leaf, whole = (jc.prune.Magnitude(sparsity=sparsity, scope=scope) for scope in ("leaf", "global"))
    adamw, dynamic = optax.adamw(1e-4), jc.prune.dynamic

    def plan(method: Any) -> jc.Plan:
        return jc.plan(model.params, [(KERNELS, method)])

    def chained(method: Any) -> Build:
        return compiled(model, optax.chain(adamw, jc.project(plan(method), every=100)))

    def sparse(rule: Any) -> Build:
        return compiled(model, dynamic.sparse(adamw, rule, plan(jc.prune.Random(sparsity)), key=jax.random.key(0)))

    return {
        "adamw again": lambda: compiled(model, adamw),
        "project": lambda: chained(leaf),
        "project(inner=)": lambda: compiled(model, jc.project(plan(leaf), every=100, inner=adamw)),
        "project, global": lambda: chained(whole),
        "project, 8 bits": lambda: chained(jc.quantize.Int(bits=8)),
        "compress": lambda: compressing(model, plan(leaf)),
        "simulate, 8 bits": lambda: compiled(model, adamw, lambda p: jc.simulate(p, plan(jc.quantize.Int(bits=8)))),
        "SET": lambda: sparse(dynamic.SET()),
        "RigL": lambda: sparse(dynamic.RigL(stop=10_000)),
    }


def cases(args: Any) -> Iterator[timing.Case]:
    models: list[Callable[[], Model]] = [partial(equal_matrices, n, args.width) for n in args.matrices]
    if args.depth:
        models.append(lambda: transformer(args.width, args.depth, 4, 2, 16))
    for model in (make() for make in models):
        leaves = len(jax.tree.leaves(model.params))
        for name, make in sides(model, args.sparsity).items():
            title = f"{model.name}, {leaves} leaves: {name}"
            yield timing.Case(title, "adamw", name, partial(_pair, model, make), "" if "again" in name else "<= 2")


def _pair(model: Model, make: Callable[[], Build]) -> tuple[Build, Build]:
    return compiled(model, optax.adamw(1e-4)), make()


def main(argv: Sequence[str] | None = None) -> None:
    options = {
        "matrices": ([8, 32, 96], "how many, one table each"),
        "width": (64, "of a matrix and of the transformer"),
        "depth": (12, "of the transformer; 0 for none"),
        "sparsity": (0.9, "fraction of zeros"),
    }
    timing.run("compile_time", __doc__, cases, options, argv, pairs=3)


if __name__ == "__main__":
    main()
