"""The ways to prune that are compared: ``make(lab, seed, sparsity) -> parameters``, sparse to the last weight."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jcompress as jc
from experiments.compress import State
from experiments.pruning.lab import KERNELS, Lab, Masks
from experiments.runner import Way
from jcompress.prune import bayesian, dynamic

PyTree = Any
Make = Callable[[Lab, int, float], PyTree]
Choice = Callable[[Lab, PyTree, float, int], Masks]


def dense(lab: Lab, seed: int, sparsity: float) -> PyTree:
    """The dense network with the whole budget, in the two parts that what is pruned after training has."""
    return lab.finetune(lab.dense(seed), {}, seed)


# Masks chosen once.


def random(lab: Lab, params: PyTree, sparsity: float, seed: int) -> Masks:
    """As many of each layer, at random: the control."""
    return lab.masks(params, jc.budget.uniform(lab.plan(jc.prune.Random(sparsity=sparsity)), sparsity), seed)


def uniform(lab: Lab, params: PyTree, sparsity: float, seed: int) -> Masks:
    """The largest of each layer."""
    return lab.masks(params, jc.budget.uniform(lab.plan(jc.prune.Magnitude(sparsity=sparsity)), sparsity), seed)


def global_(lab: Lab, params: PyTree, sparsity: float, seed: int) -> Masks:
    """The largest of all layers together."""
    return lab.masks(params, lab.plan(jc.prune.Magnitude(sparsity=sparsity, scope="global")), seed)


def erk(lab: Lab, params: PyTree, sparsity: float, seed: int) -> Masks:
    """The largest of each layer, wide layers sparser."""
    return lab.masks(params, jc.budget.erk(lab.plan(jc.prune.Magnitude(sparsity=sparsity)), sparsity), seed)


def lamp(lab: Lab, params: PyTree, sparsity: float, seed: int) -> Masks:
    """Layer-adaptive magnitude."""
    return lab.masks(params, jc.budget.lamp(lab.plan(jc.prune.Magnitude(sparsity=sparsity)), params, sparsity), seed)


def snip(lab: Lab, params: PyTree, sparsity: float, seed: int) -> Masks:
    """The largest ``|g w|`` of one batch."""
    grads = jax.jit(jax.grad(lab.loss))(params, *lab.batch(seed, lab.config.examples))
    return lab.masks(params, lab.plan(jc.prune.SNIP(sparsity=sparsity)), seed, grads=grads)


def grasp(lab: Lab, params: PyTree, sparsity: float, seed: int) -> Masks:
    """What the gradient flow lives on, by one batch."""
    table = jax.jit(functools.partial(jc.prune.grasp, lab.loss))(params, *lab.batch(seed, lab.config.examples))
    return _largest(lab, params, table, sparsity, seed)


def synflow(lab: Lab, params: PyTree, sparsity: float, seed: int) -> Masks:
    """Synaptic flow, a hundred rounds, no data."""
    example = lab.batch(seed, 1)[0]
    search = lab.once("synflow", lambda: jax.jit(lambda p, s, x: jc.prune.synflow(lab.apply, p, s, x, match=KERNELS)))
    return search(params, sparsity, example)


def wanda(lab: Lab, params: PyTree, sparsity: float, seed: int) -> Masks:
    """Magnitude times the norm of the input."""
    plan = lab.plan(jc.prune.Wanda(sparsity=sparsity))
    stats = jc.calibrate(lab.apply, params, [lab.batch(seed, lab.config.examples)[:1]], plan=plan)
    return lab.masks(params, plan, seed, stats=stats)


def _largest(
    lab: Lab, params: PyTree, table: dict[str, jax.Array], sparsity: float, seed: int, scope: Any = "global"
) -> Masks:
    score = jc.prune.scores.lookup(table)
    return lab.masks(params, lab.plan(jc.prune.ByScore(sparsity=sparsity, scope=scope, score=score)), seed)


def after(choose: Choice) -> Make:
    """Train dense, choose, train what is left."""

    def way(lab: Lab, seed: int, sparsity: float) -> PyTree:
        params = lab.dense(seed)
        return lab.finetune(params, choose(lab, params, sparsity, seed), seed)

    return way


def before(choose: Choice, rule: Callable[[int], Any] | None = None, share: float = 0.02) -> Make:
    """Choose at the start, train with the whole budget; with a rule, the masks move fifty times."""

    def way(lab: Lab, seed: int, sparsity: float) -> PyTree:
        params = lab.start(seed)
        masks = choose(lab, params, sparsity, seed)
        every = max(round(lab.steps * share), 1)
        moved = None if rule is None else rule(lab.steps)
        return lab.sparse(params, masks, seed, lab.steps, moved, every=every)

    return way


def untrained(choose: Choice) -> Make:
    """Train dense with the whole budget, choose, and leave it at that."""

    def way(lab: Lab, seed: int, sparsity: float) -> PyTree:
        params = dense(lab, seed, sparsity)
        return dynamic.lay(params, choose(lab, params, sparsity, seed))

    return way


def random_erk(lab: Lab, params: PyTree, sparsity: float, seed: int) -> Masks:
    """At random, wide layers sparser: where sparse training begins."""
    return lab.masks(params, jc.budget.erk(lab.plan(jc.prune.Random(sparsity=sparsity)), sparsity), seed)


# Weights and masks together.


def _sparsegpt(lab: Lab, params: PyTree, sparsity: float, seed: int) -> PyTree:
    plan = lab.plan(jc.prune.SparseGPT(sparsity=sparsity))
    stats = jc.calibrate(lab.apply, params, [lab.batch(seed, lab.config.examples)[:1]], plan=plan)
    return jc.compress(params, plan, stats=stats)


def sparsegpt(lab: Lab, seed: int, sparsity: float) -> PyTree:
    """Masks and weights by the Gram matrices of inputs, layer by layer, then fine-tuned."""
    tree = _sparsegpt(lab, lab.dense(seed), sparsity, seed)
    masks = {path: node.mask for path, node in jc.paths(tree) if hasattr(node, "mask")}
    return lab.finetune(jc.materialize(tree), masks, seed)


def sparsegpt_untrained(lab: Lab, seed: int, sparsity: float) -> PyTree:
    """The same at the end of the whole budget."""
    return jc.materialize(_sparsegpt(lab, dense(lab, seed, sparsity), sparsity, seed))


def gradual(lab: Lab, seed: int, sparsity: float) -> PyTree:
    """One threshold for all layers, on a cubic ramp over two thirds of the second half."""
    begin, steps = lab.dense(seed), lab.half

    def transform(level: Any) -> optax.GradientTransformationExtraArgs:
        unit = optax.polynomial_schedule(0.0, 1.0, power=3, transition_steps=max(steps * 2 // 3, 1))
        plan = lab.plan(jc.prune.Magnitude(sparsity=lambda step: level * unit(step), scope="global"))
        return optax.chain(lab.optimizer(steps), jc.project(plan, every=_EVERY))

    def build() -> Any:
        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: State, level: Any, pace: None, x: jax.Array, y: jax.Array, index: jax.Array) -> Any:
            value, grads = jax.value_and_grad(lab.loss)(state.params, x[index], y[index])
            updates, opt_state = transform(level).update(grads, state.opt_state, state.params)
            return State(optax.apply_updates(state.params, updates), opt_state, state.step + 1), value

        return step

    state = State(jax.tree.map(jnp.copy, begin), transform(sparsity).init(begin), jnp.zeros((), jnp.int32))
    return lab.fit(lab.once("gradual", build), state, jnp.float32(sparsity), steps, lab.order(seed, 2), seed).params


_EVERY = 8


def lottery(lab: Lab, seed: int, sparsity: float) -> PyTree:
    """Train, prune once, go back to a twentieth of that training, train again."""
    masks = global_(lab, lab.dense(seed), sparsity, seed)
    return lab.sparse(lab.early(seed), masks, seed, lab.half)


def lottery_redrawn(lab: Lab, seed: int, sparsity: float) -> PyTree:
    """The lottery ticket's control: its masks on newly drawn weights."""
    masks = global_(lab, lab.dense(seed), sparsity, seed)
    return lab.sparse(lab.start(seed + 1_000), masks, seed, lab.half)


# Learned gates and scores: trained for part of the second half, cut to the exact count, then fine-tuned.


def _learned(
    lab: Lab,
    name: str,
    method: Callable[[Any], Any],
    penalty: Callable[[PyTree, Any, jax.Array], Any],
    score: Callable[[Any], jax.Array],
    rates: dict[str, float],
    sparsity: float,
    seed: int,
    part: float,
    scope: Any = "global",
) -> PyTree:
    """Train nodes from the dense network on, keep the weights of largest score, and fine-tune these.

    Args:
      lab: the budget.
      name: of the way, under which its step is compiled.
      method: from a sparsity, perhaps traced, to the method that makes the nodes.
      penalty: of the tree, the sparsity and the part done, in [0, 1], to be added to the loss.
      score: of a node.
      rates: for the name of a trainable field of the nodes, what its learning rate is multiplied by.
      sparsity: the fraction of zeros.
      seed: of the split, the start and the order.
      part: of the second half that learns; the rest fine-tunes.
      scope: of the cut.
    """
    steps = max(round(lab.half * part), 1)
    begin = lab.dense(seed)
    optimizers = {field: lab.optimizer(steps, rate) for field, rate in {"": 1.0, **rates}.items()}

    def labels(tree: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: next((n for n in rates if n in str(path[-1])), ""), tree
        )

    tx = optax.partition(optimizers, labels)

    def build() -> Any:
        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: State, held: Any, pace: None, x: jax.Array, y: jax.Array, index: jax.Array) -> Any:
            fixed, level, key = held

            def loss(trained: PyTree) -> jax.Array:
                plan = lab.plan(method(level))
                tree = dynamic.select(jc.merge(trained, fixed), plan, state.step)
                dense = jc.materialize(tree, key=jax.random.fold_in(key, state.step))
                return lab.loss(dense, x[index], y[index]) + penalty(tree, level, state.step / steps)

            value, grads = jax.value_and_grad(loss)(state.params)
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            return State(optax.apply_updates(state.params, updates), opt_state, state.step + 1), value

        return step

    trained, fixed = jc.split(jc.compress(begin, lab.plan(method(sparsity)), key=jax.random.key(seed)))
    state = State(trained, tx.init(trained), jnp.zeros((), jnp.int32))
    held = (fixed, jnp.float32(sparsity), jax.random.key(20_000 + seed))
    state = lab.fit(lab.once(name, build), state, held, steps, lab.order(seed, 2), seed)
    tree = jc.merge(state.params, fixed)
    table = {path: score(node) for path, node in jc.paths(tree) if _is_node(node)}
    masks = _largest(lab, begin, table, sparsity, seed, scope)
    return lab.sparse(jc.materialize(tree), masks, seed, lab.half - steps, key=3)


def _is_node(x: Any) -> bool:
    return isinstance(x, jc.Compressed)


def movement(lab: Lab, seed: int, sparsity: float) -> PyTree:
    """Scores that gain where weights move away from zero, with the ramp of gradual pruning."""
    unit = optax.polynomial_schedule(0.0, 1.0, power=3, transition_steps=max(lab.half // 2, 1))
    return _learned(
        lab, "movement",
        lambda level: dynamic.Movement(sparsity=lambda step: level * unit(step)),
        lambda tree, level, done: 0.0,
        lambda node: node.scores,
        {"scores": lab.config.gate_rate}, sparsity, seed, part=0.75, scope="leaf",
    )  # fmt: skip


def l0(lab: Lab, seed: int, sparsity: float) -> PyTree:
    """Hard concrete gates, their expected density pressed down to the wanted one."""

    def penalty(tree: PyTree, level: Any, done: jax.Array) -> jax.Array:
        gates = [x for x in jax.tree.leaves(tree, is_leaf=_is_node) if _is_node(x)]
        density = bayesian.penalty(tree) / sum(x.values.size for x in gates)
        wanted = 1 - level * jnp.minimum(done / 0.7, 1.0)
        return lab.config.pressure * jax.nn.relu(density - wanted)

    return _learned(
        lab, "l0", lambda level: jc.prune.HardConcrete(keep=0.95), penalty, lambda node: node.log_alpha,
        {"log_alpha": lab.config.gate_rate}, sparsity, seed, part=0.6,
    )  # fmt: skip


def variational_dropout(lab: Lab, seed: int, sparsity: float) -> PyTree:
    """Sparse variational dropout with its divergence annealed in; the largest dropout rates go."""
    examples = len(lab.load(seed).train) * (lab.load(seed).train.y[0].size)

    def penalty(tree: PyTree, level: Any, done: jax.Array) -> jax.Array:
        return jnp.minimum(done / 0.5, 1.0) * bayesian.penalty(tree) / examples

    return _learned(
        lab, "variational_dropout", lambda level: jc.prune.VariationalDropout(), penalty,
        lambda node: 2 * jnp.log(jnp.abs(node.mean) + 1e-12) - node.log_variance,
        {"log_variance": lab.config.gate_rate}, sparsity, seed, part=0.6,
    )  # fmt: skip


AT_ONCE, LEARNED = "after training, at once", "after training, little by little or learned"
EARLY, UNTRAINED = "from the start", "without fine-tuning"
WAYS = [
    Way("random", after(random), family=AT_ONCE),
    Way("magnitude, uniform", after(uniform), family=AT_ONCE),
    Way("magnitude, ERK", after(erk), family=AT_ONCE),
    Way("magnitude, LAMP", after(lamp), family=AT_ONCE),
    Way("magnitude, global", after(global_), family=AT_ONCE),
    Way("magnitude, gradual", gradual, family=LEARNED),
    Way("Wanda", after(wanda), family=AT_ONCE),
    Way("SparseGPT", sparsegpt, family=AT_ONCE),
    Way("movement", movement, family=LEARNED),
    Way("l0 (hard concrete)", l0, family=LEARNED),
    Way("variational dropout", variational_dropout, family=LEARNED),
    Way("lottery ticket", lottery, family=LEARNED),
    Way("lottery ticket, redrawn", lottery_redrawn, family=LEARNED),
    Way("random at the start", before(random_erk), family=EARLY),
    Way("SNIP", before(snip), family=EARLY),
    Way("GraSP", before(grasp), family=EARLY),
    Way("SynFlow", before(synflow), family=EARLY),
    Way("SET", before(random_erk, lambda steps: dynamic.SET()), family=EARLY),
    Way("RigL", before(random_erk, lambda steps: dynamic.RigL(stop=steps * 3 // 4)), family=EARLY),
    Way("sparse momentum", before(random_erk, lambda steps: dynamic.SparseMomentum()), family=EARLY),
    Way("magnitude, not fine-tuned", untrained(global_), family=UNTRAINED),
    Way("Wanda, not fine-tuned", untrained(wanda), family=UNTRAINED),
    Way("SparseGPT, not fine-tuned", sparsegpt_untrained, family=UNTRAINED),
]
"""The last three show what a mask costs by itself; all others have trained for the whole budget."""

SHORT = tuple(
    way.name
    for way in WAYS
    if way.name not in ("magnitude, LAMP", "Wanda", "sparse momentum")
    and not way.name.endswith(("redrawn", "not fine-tuned"))
)
"""Those that no comparison should lack."""
