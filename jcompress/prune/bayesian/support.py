"""A prior that expects kept entries in runs, and exact inference under it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core


def gaussian_evidence(w: jax.Array, kept: Any, pruned: Any) -> jax.Array:
    """The log ratio of ``N(w; 0, kept)`` to ``N(w; 0, pruned)``: what a weight alone says about its support.

    Args:
      w: weights, any shape.
      kept: variance of weights in the support.
      pruned: variance of the others, smaller.

    Returns:
      A float32 array of the shape of ``w``. Sum it over a row or a filter for the evidence of the whole.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import bayesian
      >>> [round(x, 2) for x in bayesian.gaussian_evidence(jnp.array([0.0, 1.0]), 1.0, 0.01).tolist()]
      [-2.3, 47.2]
    """
    w = w.astype(jnp.float32)
    return 0.5 * (jnp.square(w) * (1 / pruned - 1 / kept) - jnp.log(kept / pruned))


def chain_posterior(evidence: jax.Array, density: Any, run: Any, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    """The probability of each entry to be in the support, if the support is a Markov chain along an axis.

    Sum-product on ``p(s) = p(s_1) prod p(s_i | s_{i-1})``, exact: forward and backward messages in two scans. The
    chain is stationary: ``density`` of the entries are in the support, in runs of ``run`` on average. ``run = 1 / (1 -
    density)`` makes entries independent.

    This is the module of Turbo-VBI that holds the structured prior (Xia, Tsang & Lau 2023, arXiv:2302.10483),
    reconstructed from its description: a hidden Markov chain over rows or columns gives clustered weights. The paper
    alternates it with variational Bayes on the weights, and hands the extrinsic messages back and forth; here they are
    the second value returned, to be added to the prior log odds in a loop of the caller's. That loop is not here.

    Args:
      evidence: log likelihood ratio of support to no support, any shape.
      density: the expected fraction of entries in the support, in (0, 1).
      run: the mean length of a run in the support, at least 1 and at least ``density / (1 - density)``.
      axis: along which the chain runs; the others are chains of their own.

    Returns:
      ``(probability, extrinsic)`` of the shape of ``evidence``: the posterior probability of the support, and the log
      odds that the rest of the chain and the prior give to an entry, without its own evidence.

    Raises:
      ValueError: for a density or run outside its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import bayesian
      >>> evidence = jnp.array([4.0, 0.0, 4.0, -4.0, -4.0, 0.0, -4.0])
      >>> probability, _ = bayesian.chain_posterior(evidence, density=0.5, run=5.0)
      >>> (probability > 0.5).tolist()
      [True, True, True, False, False, False, False]
    """
    if core.is_concrete(density) and core.is_concrete(run):
        _check(float(density), float(run))
    moved = jnp.moveaxis(evidence.astype(jnp.float32), axis, 0)
    leave = 1 / jnp.asarray(run, jnp.float32)
    enter = leave * density / (1 - density)
    start = jnp.full(moved.shape[1:], jnp.log(density) - jnp.log1p(-density))

    def forward(odds: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Log odds of an entry before its own evidence; those of the next follow from it and the transition.
        seen = odds + step
        stay = jax.nn.log_sigmoid(seen) + jnp.log1p(-leave), jax.nn.log_sigmoid(-seen) + jnp.log(enter)
        go = jax.nn.log_sigmoid(seen) + jnp.log(leave), jax.nn.log_sigmoid(-seen) + jnp.log1p(-enter)
        return jnp.logaddexp(*stay) - jnp.logaddexp(*go), odds

    def backward(message: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen = message + step
        within = jnp.logaddexp(seen + jnp.log1p(-leave), jnp.log(leave))
        outside = jnp.logaddexp(seen + jnp.log(enter), jnp.log1p(-enter))
        return within - outside, message

    _, ahead = jax.lax.scan(forward, start, moved)
    _, behind = jax.lax.scan(backward, jnp.zeros_like(start), moved, reverse=True)
    extrinsic = ahead + behind
    return (
        jnp.moveaxis(jax.nn.sigmoid(extrinsic + moved), 0, axis),
        jnp.moveaxis(extrinsic, 0, axis),
    )


def _check(density: float, run: float) -> None:
    if not 0 < density < 1:
        raise ValueError(f"chain_posterior: density={density} is outside (0, 1); it is a fraction of the entries")
    shortest = max(1.0, density / (1 - density))
    if run < shortest * (1 - 1e-6):
        raise ValueError(f"chain_posterior: run={run} is too short for density={density}; use {shortest:g} or more")
