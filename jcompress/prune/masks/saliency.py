"""Pruning by what the loss says of each weight: its first and second derivatives."""

from __future__ import annotations

import dataclasses

from jcompress.prune import scores
from jcompress.prune.masks import selection
from jcompress.prune.masks.scored import ByScore, fixed


@dataclasses.dataclass(frozen=True)
class Taylor(ByScore):
    """Keep the weights whose removal changes the loss most, to first order: ``|g w|``.

    Molchanov et al. 2017, arXiv:1611.06440, and 2019, arXiv:1906.10771. Needs gradients:
    ``jc.compress(params, plan, grads=grads)``, or ``jc.project(plan, inner=optimizer)``, which knows them.

    Attributes:
      sparsity: the fraction of zeros, as for :class:`Magnitude`.
      scope: ``"leaf"``, ``"output"`` or ``"global"``.
      pattern: :class:`NM`, :class:`Block` or :class:`Shared`, or None for unstructured.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params, grads = {"w": jnp.array([1.0, -4.0])}, {"w": jnp.array([9.0, 0.1])}
      >>> plan = jc.plan(params, [("w", jc.prune.Taylor(sparsity=0.5))])
      >>> jc.compress(params, plan, grads=grads)["w"].materialize().tolist()
      [1.0, 0.0]
    """

    score: scores.Score = fixed(scores.taylor)


@dataclasses.dataclass(frozen=True)
class SNIP(ByScore):
    """Keep the weights of largest connection sensitivity, compared over all leaves of the rule.

    The sensitivity is ``|dL/dc| = |g w|`` for a factor ``c = 1`` on each weight, and is divided by its sum, which
    changes no rank (Lee et al. 2019, arXiv:1810.02340). To be used once, at initialization, with the gradients of a
    batch: ``jc.compress(params, plan, grads=jax.grad(loss)(params, batch))``.

    Attributes:
      sparsity: the fraction of zeros, as for :class:`Magnitude`.
      scope: ``"global"``, as in the paper, ``"leaf"`` or ``"output"``.
      pattern: :class:`NM`, :class:`Block` or :class:`Shared`, or None for unstructured.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"a": jnp.array([1.0, 1.0]), "b": jnp.array([1.0, 1.0])}
      >>> grads = {"a": jnp.array([0.1, 0.2]), "b": jnp.array([3.0, -4.0])}
      >>> small = jc.compress(params, jc.plan(params, [(".*", jc.prune.SNIP(sparsity=0.5))]), grads=grads)
      >>> small["a"].mask.tolist(), small["b"].mask.tolist()
      ([False, False], [True, True])
    """

    scope: selection.Scope = "global"
    score: scores.Score = fixed(scores.taylor)


@dataclasses.dataclass(frozen=True)
class Fisher(ByScore):
    """Keep the weights of largest ``g**2 w**2 / 2``, with the mean squared gradient in place of the curvature.

    The empirical Fisher information (Theis et al. 2018, arXiv:1801.05787; as a diagonal, Singh & Alistarh 2020,
    arXiv:2004.14340). Needs the statistic ``grad_square``:
    ``jc.calibrate(fn, params, batches, plan=plan, loss=loss, per_example=True)``.

    Attributes:
      sparsity: the fraction of zeros, as for :class:`Magnitude`.
      scope: ``"leaf"``, ``"output"`` or ``"global"``.
      pattern: :class:`NM`, :class:`Block` or :class:`Shared`, or None for unstructured.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([[1.0], [2.0]])}
      >>> fn = lambda p, x: x @ p["w"]
      >>> plan = jc.plan(params, [("w", jc.prune.Fisher(sparsity=0.5))])
      >>> batches = [jnp.array([[5.0, 1.0]])]
      >>> stats = jc.calibrate(fn, params, batches, plan=plan, loss=lambda p, x: fn(p, x).sum())
      >>> jc.compress(params, plan, stats=stats)["w"].materialize().tolist()
      [[1.0], [0.0]]
    """

    score: scores.Score = fixed(scores.fisher)


@dataclasses.dataclass(frozen=True)
class OBD(ByScore):
    """Optimal brain damage: keep the weights of largest ``h w**2 / 2``, ``h`` the diagonal of the loss's Hessian.

    LeCun, Denker & Solla 1990. Needs the statistic ``hessian_diagonal``:
    ``jc.calibrate(fn, params, batches, plan=plan, loss=loss, key=key)``, an estimate after Hutchinson that is exact
    where the Hessian is diagonal.

    Attributes:
      sparsity: the fraction of zeros, as for :class:`Magnitude`.
      scope: ``"leaf"``, ``"output"`` or ``"global"``.
      pattern: :class:`NM`, :class:`Block` or :class:`Shared`, or None for unstructured.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([[1.0], [2.0]])}
      >>> fn = lambda p, x: x @ p["w"]
      >>> plan = jc.plan(params, [("w", jc.prune.OBD(sparsity=0.5))])
      >>> batches, loss = [jnp.diag(jnp.array([5.0, 1.0]))], lambda p, x: (fn(p, x)**2).sum()
      >>> stats = jc.calibrate(fn, params, batches, plan=plan, loss=loss, key=jax.random.key(0))
      >>> jc.compress(params, plan, stats=stats)["w"].materialize().tolist()
      [[1.0], [0.0]]
    """

    score: scores.Score = fixed(scores.hessian)
