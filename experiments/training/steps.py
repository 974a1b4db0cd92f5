"""The training state under a plan, and the step that changes it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jcompress as jc
from experiments.training.tasks import Task
from jcompress.projection import needs

PyTree = Any
HOW = ("project", "simulate", "nodes")


class State(NamedTuple):
    """All that a checkpoint keeps but the position in the data.

    Attributes:
      step: steps taken.
      params: what is trained: dense arrays, or what :func:`jcompress.split` gives of nodes.
      held: the rest of the nodes, where these are trained.
      extra: arrays that training changes without gradients, as batch statistics.
      opt_state: of the optimizer.
    """

    step: jax.Array
    params: PyTree
    held: PyTree
    extra: PyTree
    opt_state: PyTree


@dataclasses.dataclass(frozen=True)
class Trainer:
    """How a task is trained under a plan. All functions are pure, and are compiled where they are used.

    Attributes:
      task: what is learned.
      plan: of the dense parameters.
      how: ``"project"``: dense parameters, moved onto the compressed set after each step. ``"simulate"``: dense
        parameters whose forward pass is compressed, the backward pass straight through. ``"nodes"``: parameters are
        compressed once, and what is trainable in the nodes is trained.
      optimizer: without the projection.
      every: steps between refits, for ``"project"``.
      seed: of the parameters, and of methods that draw.
    """

    task: Task
    plan: jc.Plan
    how: str
    optimizer: optax.GradientTransformation
    every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise ValueError(f"config.compress.how: {self.how!r} is unknown; use one of {', '.join(HOW)}")

    @property
    def key(self) -> jax.Array:
        return jax.random.key(self.seed)

    @property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The whole chain, the projection last."""
        if self.how != "project":
            return optax.with_extra_args_support(self.optimizer)
        link = jc.project(self.plan, every=self.every, key=self.key if needs(self.plan, "key") else None)
        return optax.chain(self.optimizer, link)

    def init(self) -> State:
        """The state before the first step."""
        params, extra = self.task.init(self.key)
        return self.start(params, extra)

    def start(self, params: PyTree, extra: PyTree) -> State:
        """The same from given parameters."""
        held: PyTree = ()
        if self.how == "nodes":
            params, held = jc.split(jc.compress(params, self.plan, step=0, key=self.key))
        return State(jnp.zeros((), jnp.int32), params, held, extra, self.tx.init(params))

    def dense(self, params: PyTree, held: PyTree, step: jax.Array) -> PyTree:
        """The arrays that the model sees."""
        if self.how == "simulate":
            return jc.simulate(params, self.plan, step=step, key=jax.random.fold_in(self.key, step))
        return jc.materialize(jc.merge(params, held)) if self.how == "nodes" else params

    def step(self, state: State, batch: Mapping[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
        """One step on a batch (parts, examples, ...); gradients are the mean over its parts."""
        dense, back = jax.vjp(lambda params: self.dense(params, state.held, state.step), state.params)
        loss, extra, grads = gradients(self.task.loss, dense, state.extra, batch)
        (grads,) = back(grads)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params, grads=grads)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(grads)}
        return State(state.step + 1, params, state.held, extra, opt_state), metrics

    def judge(self, state: State, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """How well a batch (1, examples, ...) is solved by what would be stored."""
        dense = self.dense(state.params, state.held, state.step)
        return self.task.judge(dense, state.extra, {name: x[0] for name, x in batch.items()})

    def finish(self, state: State) -> PyTree:
        """The compressed parameters in storage form."""
        if self.how == "nodes":
            return jc.finalize(jc.merge(state.params, state.held))
        if self.how == "project":
            return jc.finalize(jc.nodes(state.params, state.opt_state))
        key = jax.random.fold_in(self.key, state.step)
        return jc.finalize(jc.compress(state.params, self.plan, step=state.step, key=key))


Loss = Callable[[PyTree, PyTree, Mapping[str, jax.Array]], tuple[jax.Array, PyTree]]


def gradients(
    loss: Loss, params: PyTree, extra: PyTree, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, PyTree, PyTree]:
    """The mean loss over the parts of a batch, what the last of them left in ``extra``, and the mean gradients."""
    one = jax.value_and_grad(loss, has_aux=True)
    parts = jax.tree.leaves(batch)[0].shape[0]
    if parts == 1:  # convolutions in a loop are slow on CPUs
        (value, extra), grads = one(params, extra, {name: x[0] for name, x in batch.items()})
        return value, extra, grads

    def added(carry: tuple, part: Mapping[str, jax.Array]) -> tuple[tuple, None]:
        total, extra, sums = carry
        (value, extra), grads = one(params, extra, part)
        return (total + value, extra, jax.tree.map(jnp.add, sums, grads)), None

    start = jnp.zeros(()), extra, jax.tree.map(jnp.zeros_like, params)
    (total, extra, sums), _ = jax.lax.scan(added, start, dict(batch))
    return total / parts, extra, jax.tree.map(lambda x: x / parts, sums)


def make_optimizer(options: Mapping[str, Any], steps: int) -> optax.GradientTransformation:
    """AdamW behind a clipped norm, its rate warmed up and then a cosine to zero.

    Args:
      options: ``learning_rate``, ``warmup`` in steps, ``weight_decay``, ``decay``, a pattern that is searched in the
        paths of what decays, and ``clip``, the largest norm of the gradients; 0 for any.
      steps: of the whole run.

    Raises:
      ValueError: for a field that there is not.
    """
    known = {"learning_rate": 1e-3, "warmup": 0, "weight_decay": 0.0, "decay": "kernel|weight", "clip": 1.0}
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"config.optimizer: {unknown[0]!r} is unknown; use some of {', '.join(known)}")
    chosen = {**known, **options}
    if not 0 <= chosen["warmup"] < steps:
        raise ValueError(f"config.optimizer.warmup={chosen['warmup']} must be less than config.steps={steps}")
    rate = optax.warmup_cosine_decay_schedule(
        0.0 if chosen["warmup"] else chosen["learning_rate"], chosen["learning_rate"], chosen["warmup"], steps
    )

    def decays(params: PyTree) -> PyTree:
        def one(keys: tuple, _: Any) -> bool:
            return bool(re.search(chosen["decay"], jax.tree_util.keystr(keys, simple=True, separator="/")))

        return jax.tree_util.tree_map_with_path(one, params)

    adamw = optax.adamw(rate, b2=0.95, weight_decay=chosen["weight_decay"], mask=decays)
    return optax.chain(optax.clip_by_global_norm(chosen["clip"]), adamw) if chosen["clip"] else adamw
