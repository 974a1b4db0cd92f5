"""A compression plan as stages of training: what is compressed, and how it is fine-tuned."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import jcompress as jc
from experiments import train

PyTree = Any
Rules = Sequence[tuple[str, Any]]


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

    rules: Rules
    train: Literal["nodes", "project", "simulate", "none"] = "nodes"
    part: float = 1.0
    every: int = 16
    host: bool = False

    def __post_init__(self) -> None:
        if self.train not in ("nodes", "project", "simulate", "none"):
            raise ValueError(f"Stage: train={self.train!r} is unknown; use 'nodes', 'project', 'simulate' or 'none'")


class Program:
    """One stage for one model, compiled once and run for every seed.

    Args:
      stage: what to do.
      params: parameters of the model, or their shapes.
      apply: ``apply(params, x) -> logits``.
      steps: training steps.
      learning_rate: of Adam, at its peak; it falls to 0 as a cosine.
    """

    def __init__(self, stage: Stage, params: PyTree, apply: train.Apply, steps: int, learning_rate: float) -> None:
        self.stage = stage
        self.steps = 0 if stage.train == "none" else max(round(steps * stage.part), 1)
        self.plan = jc.plan(params, stage.rules)
        tx = optax.adam(optax.cosine_decay_schedule(learning_rate, max(self.steps, 1)))
        if stage.train == "project":
            draws = any("key" in getattr(method, "needs", ()) for method in self.plan.values())
            tx = optax.chain(tx, jc.project(self.plan, every=stage.every, key=jax.random.key(0) if draws else None))
        self._init = jax.jit(tx.init)
        self._compress = self._fit if stage.host else jax.jit(self._fit)
        self.step = train.make_step(apply, tx, self._forward())

    def _fit(self, params: PyTree, key: jax.Array) -> PyTree:
        return jc.compress(params, self.plan, step=self.steps, key=key)

    def begin(self, params: PyTree, key: jax.Array) -> tuple[train.State, PyTree]:
        """The state to train, and what is held, from dense parameters. Nothing is shared with ``params``."""
        if self.stage.train in ("project", "simulate"):
            return self._state(jax.tree.map(jnp.copy, params)), key
        trained, rest = jc.split(self._compress(params, key))
        return self._state(_widened(trained)), (_dtypes(trained), rest)

    def _state(self, params: PyTree) -> train.State:
        return train.State(params, self._init(params), jnp.zeros((), jnp.int32))

    def finish(self, state: train.State, held: PyTree, key: jax.Array) -> PyTree:
        """The compressed parameters in storage form."""
        if self.stage.train in ("project", "simulate"):
            return jc.finalize(self._compress(state.params, key))
        dtypes, rest = held
        return jc.finalize(jc.merge(_narrowed(state.params, dtypes), rest))

    def _forward(self) -> train.Forward | None:
        def nodes(params: PyTree, held: PyTree, step: jax.Array) -> PyTree:
            dtypes, rest = held
            return jc.materialize(jc.merge(_narrowed(params, dtypes), rest))

        def simulate(params: PyTree, key: PyTree, step: jax.Array) -> PyTree:
            return jc.simulate(params, self.plan, step=step, key=key)

        return {"nodes": nodes, "simulate": simulate}.get(self.stage.train)


def _dtypes(tree: PyTree) -> PyTree:
    """Empty arrays that carry the dtypes of ``tree``, since a dtype is no leaf."""
    return jax.tree.map(lambda x: jnp.zeros((0,), x.dtype), tree)


def _widened(tree: PyTree) -> PyTree:
    """Float32 copies: what is stored in 16 bits is trained in 32, or small updates would be rounded away."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _narrowed(tree: PyTree, dtypes: PyTree) -> PyTree:
    return jax.tree.map(lambda x, like: x.astype(like.dtype), tree, dtypes)


def describe(x: Any, steps: int) -> Any:
    """A stage, rule or method as plain JSON values; a schedule by its values at five points of its stage.

    What is called with more than the step, such as a score, is told by its name.
    """
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        fields = {f.name: describe(getattr(x, f.name), steps) for f in dataclasses.fields(x)}
        return {"name": type(x).__name__, **fields}
    if callable(x) and len(inspect.signature(x).parameters) > 1:
        return getattr(x, "__name__", repr(x))
    if callable(x):
        return {"schedule": [round(float(x(steps * i // 4)), 6) for i in range(5)]}
    if isinstance(x, (list, tuple)):
        return [describe(y, steps) for y in x]
    return x if isinstance(x, (str, int, float, bool, type(None))) else repr(x)


PlanFunction = Callable[[PyTree, int], list[Stage]]
"""From the shapes of the parameters and the number of fine-tuning steps to the stages of a plan."""
