"""A prior that expects kept entries in runs, and exact inference under it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
    reconstructed from its description: a hidden Markov chain over rows or columns gives clustered weights. The
    extrinsic messages are the second value returned. :func:`structured_posterior` alternates it with the weights.

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
    probability, extrinsic, _ = _sum_product(evidence, density, run, axis)
    return probability, extrinsic


def _sum_product(evidence: jax.Array, density: Any, run: Any, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Probabilities, extrinsic log odds, and the log of the mean of ``exp(s . evidence)`` over all chains."""
    moved = jnp.moveaxis(evidence.astype(jnp.float32), axis, 0)
    leave = 1 / jnp.asarray(run, jnp.float32)
    enter = leave * jnp.asarray(density / (1 - density), jnp.float32)
    start = jnp.full(moved.shape[1:], jnp.log(density) - jnp.log1p(-density), jnp.float32)

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
    # Each factor is the chance of an entry's evidence given all entries before it.
    total = jnp.logaddexp(jax.nn.log_sigmoid(ahead) + moved, jax.nn.log_sigmoid(-ahead)).sum()
    return jnp.moveaxis(jax.nn.sigmoid(extrinsic + moved), 0, axis), jnp.moveaxis(extrinsic, 0, axis), total


class SupportPosterior(NamedTuple):
    """What :func:`structured_posterior` finds.

    Attributes:
      probability: of each weight to be in the support.
      mean: of each weight.
      variance: of each weight.
      bound: the evidence lower bound after each round, (rounds,); it never falls.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import bayesian
      >>> found = bayesian.structured_posterior(jnp.array([1.2, -0.9, 0.01, 0.02]), 1e-3, density=0.5, run=2.0)
      >>> found.probability.shape, bool((found.bound[1:] >= found.bound[:-1] - 1e-4).all())
      ((4,), True)
    """

    probability: jax.Array
    mean: jax.Array
    variance: jax.Array
    bound: jax.Array


def structured_posterior(
    w: jax.Array,
    variance: jax.Array,
    density: Any,
    run: Any,
    axis: int = -1,
    *,
    kept: tuple[float, float] = (1.0, 1.0),
    pruned: tuple[float, float] = (1.0, 1e-3),
    rounds: int = 20,
) -> SupportPosterior:
    """Variational Bayes for weights whose support is a Markov chain: the three-layer prior of Turbo-VBI.

    ``s`` is the chain of :func:`chain_posterior`, the precision ``rho | s`` is ``Gamma(*kept)`` or ``Gamma(*pruned)``,
    the weight ``v | rho`` is ``N(0, 1 / rho)``. The data are seen through a Gaussian likelihood ``w ~ N(v, variance)``,
    as a trained network gives it by Laplace's method. A round updates ``q(v)`` and then ``q(rho, s)``, by sum-product
    over the whole chain, so every round raises the evidence lower bound.

    A reconstruction from the description of Xia, Tsang & Lau 2023, arXiv:2302.10483. There the module of the weights
    trains them by gradients through the network, with independent supports, and messages pass between the two; here it
    is in closed form about weights that are trained already, and precisions share a factor with the support, where
    separate ones are easily stuck. Prune where the probability is small.

    Args:
      w: trained weights, any shape.
      variance: of the likelihood, of the shape of ``w`` or a scalar: one over the curvature of the loss summed over all
        examples.
      density: as for :func:`chain_posterior`.
      run: as for :func:`chain_posterior`.
      axis: as for :func:`chain_posterior`.
      kept: shape and rate of the gamma prior of precisions in the support.
      pruned: the same outside, where the expected precision, shape over rate, is large.
      rounds: how many.

    Returns:
      A :class:`SupportPosterior`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import bayesian
      >>> w = jnp.array([1.2, 0.4, -0.9, 0.01, 0.02, -0.01])
      >>> (bayesian.structured_posterior(w, 1e-3, density=0.5, run=4.0).probability > 0.5).tolist()
      [True, True, True, False, False, False]
    """
    if core.is_concrete(density) and core.is_concrete(run):
        _check(float(density), float(run))
    w = w.astype(jnp.float32)

    def support(square: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q(rho, s) given the mean squares of weights: probabilities, mean precisions, and its part of the bound."""
        (one, first), (zero, second) = (_precision(square, *law) for law in (kept, pruned))
        probability, _, total = _sum_product(one - zero, density, run, axis)
        return probability, probability * first + (1 - probability) * second, zero.sum() + total

    def one_round(state: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], tuple]:
        spread = 1 / (1 / variance + state[1])
        mean = spread * w / variance
        probability, precision, bound = support(jnp.square(mean) + spread)
        fit = jnp.log(2 * jnp.pi * variance) + (jnp.square(w - mean) + spread) / variance
        return (probability, precision), (mean, spread, bound + 0.5 * (1 + jnp.log(spread) - fit).sum())

    (probability, _), (mean, spread, bound) = jax.lax.scan(one_round, support(jnp.square(w))[:2], None, rounds)
    return SupportPosterior(probability, mean[-1], spread[-1], bound)


def _precision(square: jax.Array, shape: float, rate: float) -> tuple[jax.Array, jax.Array]:
    """The log evidence that mean squares of weights give for a gamma law of precisions, and the mean precision.

    The constant of the Gaussian cancels against the entropy of the weights.
    """
    moved = rate + 0.5 * square
    constant = shape * math.log(rate) + math.lgamma(shape + 0.5) - math.lgamma(shape)
    return constant - (shape + 0.5) * jnp.log(moved), (shape + 0.5) / moved


def _check(density: float, run: float) -> None:
    if not 0 < density < 1:
        raise ValueError(f"chain_posterior: density={density} is outside (0, 1); it is a fraction of the entries")
    shortest = max(1.0, density / (1 - density))
    if run < shortest * (1 - 1e-6):
        raise ValueError(f"chain_posterior: run={run} is too short for density={density}; use {shortest:g} or more")
