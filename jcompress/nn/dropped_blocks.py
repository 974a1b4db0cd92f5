"""Residual blocks that are left out: at random, by gates that learn, for each example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jcompress.nn.kernels import array, lecun_normal, listed, one_by_one, param

Block = Callable[[jax.Array], jax.Array]


def survival_rates(layers: int, last: float = 0.5) -> tuple[float, ...]:
    """How often each block stays, less often with depth: ``p_l = 1 - l / L (1 - p_L)`` (Huang et al. 2016, 1603.09382).

    Args:
      layers: ``L`` above.
      last: ``p_L`` above, in (0, 1].

    Returns:
      A rate for each of the blocks.

    Raises:
      ValueError: for a rate that is none.

    Example:
      >>> import jcompress as jc
      >>> jc.nn.survival_rates(2)
      (0.75, 0.5)
    """
    if not 0 < last <= 1:
        raise ValueError(f"survival_rates: found last {last}, expected a rate in (0, 1]")
    return tuple(1 - (i + 1) / layers * (1 - last) for i in range(layers))


def stochastic_depth(
    x: jax.Array, branch: jax.Array, survival: float | jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """A residual sum whose branch is there for some examples (stochastic depth; Huang et al. 2016, arXiv:1603.09382).

    ``x + b f(x)`` with ``b`` of 0 or 1 for each example and mean ``survival``; without a key its mean, ``x + p f(x)``.

    Args:
      x: (batch, ...).
      branch: ``f(x)``, of the shape of ``x``.
      survival: ``p`` above, in (0, 1].
      key: in training.

    Returns:
      The sum.

    Raises:
      ValueError: for shapes that differ.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.stochastic_depth(jnp.ones((1, 2)), jnp.ones((1, 2)), 0.5).tolist()
      [[1.5, 1.5]]
    """
    if x.shape != branch.shape:
        raise ValueError(f"stochastic_depth: found x {x.shape} and a branch {branch.shape}, expected equal shapes")
    if key is None:
        return x + jnp.asarray(survival, branch.dtype) * branch
    stays = jax.random.bernoulli(key, jnp.float32(survival), (x.shape[0], *(1 for _ in x.shape[1:])))
    return x + jnp.where(stays, branch, 0)


def separated_stochastic_depth(
    x: jax.Array, branch: jax.Array, survival: float | jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """:func:`stochastic_depth` of a block that adds channels, old and new ones apart (Yamada et al. 2016, 1612.01230).

    In a pyramidal network the branch has more channels than ``x``, whose shortcut is filled up with zeros. What the
    branch adds to the channels of ``x`` and what it puts into the new ones is left out independently, so that an
    example often keeps one of the two.

    Args:
      x: (batch, ..., channels).
      branch: ``f(x)``, (batch, ..., as many channels or more).
      survival: how often each of both parts stays, in (0, 1].
      key: in training.

    Returns:
      The sum, of the shape of ``branch``.

    Raises:
      ValueError: for a branch of other positions, or fewer channels.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.separated_stochastic_depth(jnp.ones((1, 2)), jnp.ones((1, 3)), 0.5).tolist()
      [[1.5, 1.5, 0.5]]
    """
    channels = x.shape[-1]
    if x.shape[:-1] != branch.shape[:-1] or channels > branch.shape[-1]:
        raise ValueError(
            f"separated_stochastic_depth: found x {x.shape} and a branch {branch.shape}, expected equal shapes but for "
            "more channels of the branch"
        )
    first, second = (None, None) if key is None else jax.random.split(key)
    old, new = branch[..., :channels], branch[..., channels:]
    parts = [stochastic_depth(x, old, survival, first), stochastic_depth(jnp.zeros_like(new), new, survival, second)]
    return jnp.concatenate(parts, axis=-1)


class StochasticDepth(nnx.Module):
    """A block that is there for some examples in training: :func:`stochastic_depth` (Huang et al. 2016, 1603.09382).

    Args:
      block: a module or function ``f`` that keeps the shape.
      survival: how often it stays, in (0, 1].
      rngs: not used.

    Raises:
      ValueError: for a rate that is none.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> block = jc.nn.StochasticDepth(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), survival=0.8)
      >>> block(jnp.ones((2, 4)), key=jax.random.key(0)).shape
      (2, 4)
    """

    def __init__(self, block: Block, survival: float, *, rngs: nnx.Rngs | None = None) -> None:
        if not 0 < survival <= 1:
            raise ValueError(f"StochasticDepth: found survival {survival}, expected a rate in (0, 1]")
        self.block, self.survival = block, survival

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The residual sum; a key in training."""
        return stochastic_depth(x, self.block(x), self.survival, key)


def gumbel_gates(
    logits: jax.Array, key: jax.Array | None = None, temperature: float | jax.Array = 1.0, hard: bool = True
) -> jax.Array:
    """Gates of 0 or 1 with a gradient (Gumbel softmax of two; Jang et al. 2016, 1611.01144; Veit & Belongie 2018).

    ``sigmoid((z + log u - log(1 - u)) / T)``; hard ones are rounded with the gradient of the soft ones, and open with
    probability ``sigmoid(z)``. Without a key gates open where ``z > 0``.

    Args:
      logits: ``z`` above, (...).
      key: in training.
      temperature: ``T`` above.
      hard: whether gates are 0 or 1.

    Returns:
      Gates (...), of the dtype of the logits.

    Raises:
      ValueError: for a temperature that is not positive.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.gumbel_gates(jnp.array([-1.0, 2.0])).tolist()
      [0.0, 1.0]
    """
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise ValueError(f"gumbel_gates: found temperature {temperature}, expected a positive number")
    noise = 0.0 if key is None else jax.random.logistic(key, logits.shape, logits.dtype)
    soft = jax.nn.sigmoid((logits + noise) / temperature)
    if not hard:
        return soft
    rounded = (logits + noise > 0).astype(soft.dtype)
    return rounded + soft - jax.lax.stop_gradient(soft)


def reinforce_loss(
    logits: jax.Array, gates: jax.Array, reward: jax.Array, baseline: jax.Array | float = 0.0
) -> jax.Array:
    """A loss whose gradient raises the expected reward of gates (REINFORCE; Williams 1992; BlockDrop, Wu et al. 2018).

    ``-mean (r - b) log P(g)`` for independent gates of probability ``sigmoid(z)``. Over draws of the gates its gradient
    is that of minus the expected reward, whatever the baseline.

    Args:
      logits: ``z`` above, (batch, gates).
      gates: drawn, of 0 and 1, (batch, gates), such as ``jax.random.bernoulli(key, jax.nn.sigmoid(z))``.
      reward: ``r`` above, (batch,), such as 1 less the share of blocks where the answer is right. It has no gradient.
      baseline: ``b`` above, that must not depend on the gates drawn.

    Returns:
      A scalar.

    Raises:
      ValueError: for shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> round(float(jc.nn.reinforce_loss(jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.array([1.0]))), 3)
      1.386
    """
    if logits.shape != gates.shape or reward.shape != logits.shape[:-1]:
        raise ValueError(f"reinforce_loss: found logits {logits.shape}, gates {gates.shape}, rewards {reward.shape}")
    log = jnp.where(gates > 0.5, jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)).sum(-1)
    return -jnp.mean(jax.lax.stop_gradient(reward - baseline) * log)


def gated_blocks(x: jax.Array, blocks: Sequence[Block], gates: jax.Array, each: bool = False) -> jax.Array:
    """Residual blocks, a gate for each example: ``x <- x + g_l f_l(x)`` (BlockDrop; Wu et al. 2018, arXiv:1711.08393).

    By default all blocks run and gates multiply, which trains; with ``each`` one example after the other runs its open
    blocks only (``jax.lax.cond``), and costs ``gates @ costs``. Both give the same for gates of 0 and 1.

    Args:
      x: (batch, ...).
      blocks: functions that keep the shape.
      gates: (batch, blocks), such as :func:`gumbel_gates` gives.
      each: whether examples run one by one.

    Returns:
      What goes, of the shape of ``x``.

    Raises:
      ValueError: for another number of gates.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> blocks = [lambda x: x, lambda x: 10 * x]
      >>> jc.nn.gated_blocks(jnp.ones((2, 1)), blocks, jnp.array([[1.0, 0.0], [1.0, 1.0]])).tolist()
      [[2.0], [22.0]]
    """
    if gates.shape != (x.shape[0], len(blocks)):
        raise ValueError(f"gated_blocks: found gates {gates.shape}, expected {(x.shape[0], len(blocks))}")
    if each:
        return one_by_one(lambda x, g: _open_ones(x, blocks, g), x, gates)
    for block, gate in zip(blocks, gates.T, strict=True):
        x = x + gate.reshape(-1, *(1 for _ in x.shape[1:])).astype(x.dtype) * block(x)
    return x


def _open_ones(x: jax.Array, blocks: Sequence[Block], gates: jax.Array) -> jax.Array:
    for i, block in enumerate(blocks):
        x = jax.lax.cond(gates[0, i] > 0.5, lambda x, f=block: x + f(x), lambda x: x, x)
    return x


class GatedBlocks(nnx.Module):
    """Residual blocks and a linear policy of their gates: :func:`gated_blocks` (BlockDrop; Wu et al. 2018, 1711.08393).

    The policy reads the mean of what comes over its positions; the paper's is a network of its own.

    Args:
      blocks: modules or functions that keep the shape.
      in_features: channels.
      kernel_init: of the policy's kernel (in_features, blocks).
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Raises:
      ValueError: for no block.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> blocks = jc.nn.GatedBlocks([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)], 4, rngs=rngs)
      >>> y, gates = blocks(jnp.ones((2, 4)), key=jax.random.key(0))
      >>> y.shape, gates.shape
      ((2, 4), (2, 3))
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        in_features: int,
        *,
        kernel_init: Callable[..., Any] = lecun_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if not len(blocks):
            raise ValueError("GatedBlocks: found no block, expected one at least")
        self.blocks = listed(blocks)
        self.kernel = param(rngs, kernel_init, (in_features, len(blocks)), param_dtype)
        self.bias = nnx.Param(jnp.ones(len(blocks), param_dtype))

    def logits(self, x: jax.Array) -> jax.Array:
        """Of the gates, (batch, blocks), for :func:`reinforce_loss`."""
        return x.mean(tuple(range(1, x.ndim - 1))) @ array(self.kernel) + array(self.bias)

    def __call__(self, x: jax.Array, key: jax.Array | None = None, each: bool = False) -> tuple[jax.Array, jax.Array]:
        """``(outputs, gates)``; a key in training, and ``each`` to leave out what is shut."""
        gates = gumbel_gates(self.logits(x), key)
        return gated_blocks(x, list(self.blocks), gates, each), gates
