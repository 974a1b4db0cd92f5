"""The list of optax transforms: all that the library offers, each with what common properties must know about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jcompress as jc
from jcompress.prune import dynamic, penalties, structured

KEY = jax.random.key(3)
RAMP = optax.linear_schedule(0.0, 0.75, 4)
KERNELS = ("a/kernel", "b/kernel")


def network() -> Any:
    """Dense parameters whose axes eight devices can share."""
    draw = [jax.random.normal(jax.random.fold_in(KEY, i), shape) for i, shape in enumerate([(16, 8), (8, 16)])]
    return {
        "a": {"kernel": draw[0], "bias": jnp.linspace(-1.0, 1.0, 8)},
        "b": {"kernel": draw[1]},
        "norm": {"scale": jnp.linspace(0.1, 1.0, 8)},
    }


def binarized() -> Any:
    """Parameters that are nodes to be trained."""
    return {"w": jc.formats.Binarized(jax.random.normal(KEY, (16, 8)), jnp.ones((1, 8)), axes=(-2,))}


@dataclasses.dataclass(frozen=True)
class Row:
    """A transform as users chain it.

    Attributes:
      name: the row's name.
      public: the transform's path below ``jc``.
      make: the whole optimizer, for parameters of the structure of ``params()`` or a tree that holds it.
      holds: the paths that its state holds.
      params: the parameters.
      exact: whether parameters are what the nodes give to the last bit.
      free: whether ``update`` goes without ``params``.
      inject: the optimizer of a number that ``inject_hyperparams`` may set, and that number.
      every: for which count of steps it is made, where it does something every so often.
      answer: whether the parameters are what training gives; FISTA's answer is its iterate.
    """

    name: str
    public: str
    make: Callable[[Any], optax.GradientTransformationExtraArgs]
    holds: tuple[str, ...] = KERNELS
    params: Callable[[], Any] = network
    exact: bool = True
    free: bool = False
    inject: tuple[Callable[[Any], optax.GradientTransformation], float] | None = None
    every: int | None = None
    answer: bool = True


def projected(method: Any, every: int = 2, wrapped: bool = False) -> Callable[[Any], Any]:
    """``project`` of all kernels by one method, behind Adam or around it."""

    def make(params: Any) -> Any:
        plan = jc.plan(params, [(".*kernel", method)])
        if wrapped:
            return jc.project(plan, every, inner=optax.adam(0.1))
        return optax.chain(optax.adam(0.1), jc.project(plan, every))

    return make


def learned(method: Any, mu: Any, every: int = 2, **options: Any) -> Callable[[Any], Any]:
    """``lc`` of all kernels behind Adam; of a large mu, so that parameters lie next to the set."""
    return lambda params: optax.chain(
        optax.adam(0.1), jc.lc(jc.plan(params, [(".*kernel", method)]), every, mu=mu, **options)
    )


def sparse(rule: Any, start: Any = jc.prune.Magnitude(sparsity=0.5)) -> Callable[[Any], Any]:
    """Sparse training of all kernels."""
    return lambda params: dynamic.sparse(optax.adam(0.1), rule, jc.plan(params, [(".*kernel", start)]), 2, key=KEY)


def behind(transform: Callable[[], Any]) -> Callable[[Any], Any]:
    """A transform that stands last in the chain."""
    return lambda params: optax.chain(optax.sgd(0.1), transform())


def before(transform: Callable[[], Any]) -> Callable[[Any], Any]:
    """A transform that stands first in the chain."""
    return lambda params: optax.chain(transform(), optax.sgd(0.1))


def rewiring(params: Any, l1: Any = 0.01) -> Any:
    """DeepR of all kernels."""
    plan = jc.plan(params, [(".*kernel", jc.prune.Magnitude(sparsity=0.5))])
    return dynamic.deep_rewiring(optax.sgd(0.1), plan, key=KEY, learning_rate=0.1, l1=l1, temperature=1e-3)


GROUPS = {"hidden": jc.trace.Group(size=8, producers=(("a/kernel", 1), ("a/bias", 0)), consumers=(("b/kernel", 0),))}
L1 = penalties.L1(0.5)
SURGERY = dynamic.Surgery(low=0.5, high=0.75)
M = jc.prune.Magnitude

TRANSFORMS = [
    Row("project, a ramp", "project", projected(M(RAMP)), every=2),
    Row("project, one threshold", "project", projected(M(RAMP, scope="global")), every=2),
    Row("project, 2:4", "project", projected(M(pattern=jc.prune.NM(2, 4)))),
    Row("project, wrapped", "project", projected(M(RAMP), wrapped=True), every=2),
    Row("project, int8", "project", projected(jc.quantize.Int(8)), exact=False),
    Row("project, codebook", "project", projected(jc.share.KMeans(4)), exact=False),
    Row("project, a nest", "project", projected(jc.chain(M(0.5), jc.quantize.Int(4))), exact=False),
    Row("project, low rank", "project", projected(jc.chain(jc.factorize.SVD(2), jc.quantize.Int(8)), 4), exact=False),
    Row("lc, a ramp", "lc", learned(M(RAMP), 1e6), every=2, exact=False),
    Row("lc, int8", "lc", learned(jc.quantize.Int(8), lambda step: 1e6 + step, multipliers=False), exact=False),
    Row("lc, low rank", "lc", learned(jc.factorize.SVD(2), 1e6, every=1), exact=False),
    Row("sparse, SET", "prune.dynamic.sparse", sparse(dynamic.SET(0.3)), every=2),
    Row("sparse, RigL", "prune.dynamic.sparse", sparse(dynamic.RigL(stop=100)), every=2),
    Row("sparse, momentum", "prune.dynamic.sparse", sparse(dynamic.SparseMomentum(0.3)), every=2),
    Row("sparse, DSR", "prune.dynamic.sparse", sparse(dynamic.DSR(0.1, threshold=0.1)), every=2),
    Row("sparse, NeST", "prune.dynamic.sparse", sparse(dynamic.NeST(turn=3)), every=2),
    Row("sparse, static", "prune.dynamic.sparse", sparse(dynamic.Static(), jc.prune.Random(0.5))),
    Row("deep_rewiring", "prune.dynamic.deep_rewiring", rewiring),
    Row(
        "latent, surgery", "prune.dynamic.latent",
        lambda params: dynamic.latent(optax.sgd(0.3), SURGERY, 2, match=".*kernel"), every=2,
    ),
    Row(
        "latent, Top-KAST", "prune.dynamic.latent",
        lambda params: dynamic.latent(optax.adam(0.1), dynamic.TopKAST(0.8, 0.5), 2, match=".*kernel"), every=2,
    ),
    Row(
        "asap", "prune.dynamic.asap", lambda params: dynamic.asap(optax.adam(0.5), 1.0, 0.1, 2), (), every=2,
        inject=(lambda x: dynamic.asap(optax.adam(0.5), 1.0, threshold=x), 0.1),
    ),
    Row(
        "proximal", "prune.penalties.proximal", behind(lambda: penalties.proximal(L1, 0.1, match=".*kernel")),
        inject=(lambda x: penalties.proximal(L1, x, match=".*kernel"), 0.1),
    ),
    Row(
        "accelerated", "prune.penalties.accelerated",
        lambda params: penalties.accelerated(L1, 0.1, match=".*kernel"), answer=False,
        inject=(lambda x: penalties.accelerated(L1, x, match=".*kernel"), 0.1),
    ),
    Row(
        "add_stable_noise", "prune.penalties.add_stable_noise",
        behind(lambda: penalties.add_stable_noise(0.01, 0.1, 1.8, KEY)), (), free=True,
        inject=(lambda x: penalties.add_stable_noise(x, 0.1, 1.8, KEY), 0.01),
    ),
    Row(
        "accumulate", "prune.accumulate", before(lambda: jc.prune.accumulate(jc.prune.scores.movement, decay=0.9)), (),
        inject=(lambda x: jc.prune.accumulate(jc.prune.scores.movement, decay=x), 0.9),
    ),
    Row(
        "group_lasso_proximal", "prune.structured.group_lasso_proximal",
        behind(lambda: structured.group_lasso_proximal(GROUPS, 0.8)), ("a/kernel",),
        inject=(lambda x: structured.group_lasso_proximal(GROUPS, x), 0.5),
    ),
    Row(
        "soft_filter", "prune.structured.soft_filter", behind(lambda: structured.soft_filter(GROUPS, 0.5, 3)),
        ("a/kernel",), every=3, inject=(lambda x: structured.soft_filter(GROUPS, x), 0.5),
    ),
    Row(
        "prune_units", "prune.structured.prune_units",
        behind(lambda: structured.prune_units(GROUPS, 3, sparsity=RAMP, score=lambda p: structured.l1(p, GROUPS))),
        ("a/bias", "a/kernel", "b/kernel"), every=3,
        inject=(lambda x: structured.prune_units(GROUPS, sparsity=x, score=lambda p: structured.l1(p, GROUPS)), 0.5),
    ),
    Row(
        "add_l1", "prune.structured.add_l1", before(lambda: structured.add_l1(0.1)), (),
        inject=(lambda x: structured.add_l1(x), 0.1),
    ),
    Row(
        "round_gradients", "quantize.round_gradients", before(lambda: jc.quantize.round_gradients(4, KEY)), (),
        free=True,
    ),
    Row(
        "moments", "quantize.moments",
        lambda params: jc.quantize.moments(projected(M(RAMP))(params), group_size=8, smallest=64),
    ),
    Row(
        "loss_scaled", "quantize.training.loss_scaled",
        lambda params: jc.quantize.training.loss_scaled(projected(M(RAMP))(params), start=8.0, patience=2),
        inject=(lambda x: jc.quantize.training.loss_scaled(optax.sgd(0.1), start=8.0, factor=x), 2.0),
    ),
    Row("mean_teacher", "distill.mean_teacher", behind(lambda: jc.distill.mean_teacher(0.9)), ()),
    Row("langevin", "distill.langevin", behind(lambda: jc.distill.langevin(1e-3, key=KEY)), (), free=True),
    Row("clip_values", "quantize.training.clip_values", behind(jc.quantize.training.clip_values), (), binarized),
]  # fmt: skip
