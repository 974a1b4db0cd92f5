"""A mixture of experts of which each example meets a few (Shazeer et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jcompress.nn.kernels import array, lecun_normal


def noisy_top_k(
    logits: jax.Array, k: int, noise: jax.Array | None = None, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Gates of which ``k`` are not zero, and each expert's load (Shazeer et al. 2017, arXiv:1701.06538).

    ``softmax(KeepTopK(h))`` with ``h = logits + eps softplus(noise)``. The load is the expected number of examples an
    expert gets: by ``P(x, i) = Phi((logits_i - kth_without_i(h)) / softplus(noise_i))``, which has a gradient; without
    a key it is their number.

    Args:
      logits: (examples, experts).
      k: how many gates are open, from 1 to the number of experts.
      noise: raw scales (examples, experts) of the noise.
      key: in training; with it ``noise`` is needed.

    Returns:
      ``(gates, load)``: (examples, experts), rows that sum to 1, and (experts,).

    Raises:
      ValueError: for a ``k`` out of range, or a key without noise.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> gates, load = jc.nn.noisy_top_k(jnp.array([[0.0, 1.0, 1.0]]), k=2)
      >>> gates.tolist(), load.tolist()
      ([[0.0, 0.5, 0.5]], [0.0, 1.0, 1.0])
    """
    experts = logits.shape[-1]
    if not 1 <= k <= experts:
        raise ValueError(f"noisy_top_k: found k {k} of {experts} experts, expected 1 to {experts}")
    if key is not None and noise is None:
        raise ValueError("noisy_top_k: found a key and no noise, expected the raw scales of the noise")
    scale = None if key is None or noise is None else jax.nn.softplus(noise)
    h = logits if key is None or scale is None else logits + scale * jax.random.normal(key, logits.shape, logits.dtype)
    most, chosen = jax.lax.top_k(h, min(k + 1, experts))
    rows = jnp.arange(logits.shape[0])[:, None]
    gates = jnp.zeros_like(h).at[rows, chosen[:, :k]].set(jax.nn.softmax(most[:, :k]))
    if scale is None or k == experts:
        return gates, jnp.sum(gates > 0, axis=0).astype(gates.dtype)
    # The least that an expert must exceed: of those that are in, the first one that is out; of the others, the last in.
    inside = h > most[:, k : k + 1]
    limit = jnp.where(inside, most[:, k : k + 1], most[:, k - 1 : k])
    return gates, jnp.sum(jax.scipy.stats.norm.cdf((logits - limit) / scale), axis=0)


def balance_loss(values: jax.Array) -> jax.Array:
    """Squared coefficient of variation, ``var / mean**2``: 0 where all experts have the same (Shazeer et al. 2017).

    Args:
      values: (experts,): the sum of each one's gates (importance), or the load.

    Returns:
      A scalar.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> float(jc.nn.balance_loss(jnp.array([1.0, 3.0])))
      0.25
    """
    mean = jnp.mean(values)
    return jnp.var(values) / jnp.where(mean == 0, 1, jnp.square(mean))


def sparse_experts(
    x: jax.Array, gates: jax.Array, up: jax.Array, down: jax.Array, k: int, dense: bool = False
) -> jax.Array:
    """Outputs of the experts behind open gates: ``sum_e g_e relu(x up_e) down_e`` (Shazeer et al. 2017, 1701.06538).

    Examples are sorted by expert and meet theirs only (``jax.lax.ragged_dot``), ``k (in + out) hidden`` multiply-adds
    an example; ``dense`` runs all experts on all examples and multiplies by the gates, to the same result.

    Args:
      x: (examples, inputs).
      gates: (examples, experts), at most ``k`` of a row not zero.
      up: (experts, inputs, hidden).
      down: (experts, hidden, outputs).
      k: experts an example.
      dense: whether all experts run.

    Returns:
      (examples, outputs).

    Raises:
      ValueError: for shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> up, down = jnp.ones((2, 3, 4)), jnp.ones((2, 4, 1))
      >>> jc.nn.sparse_experts(jnp.ones((1, 3)), jnp.array([[1.0, 0.0]]), up, down, k=1).tolist()
      [[12.0]]
    """
    if x.ndim != 2 or gates.shape != (x.shape[0], up.shape[0]) or up.shape[0] != down.shape[0]:
        raise ValueError(f"sparse_experts: found x {x.shape}, gates {gates.shape} and experts {up.shape}, {down.shape}")
    if dense:
        hidden = jax.nn.relu(jnp.einsum("ni,eih->neh", x, up))
        return jnp.einsum("neh,eho,ne->no", hidden, down, gates)
    weight, chosen = jax.lax.top_k(gates, k)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.sum(chosen.reshape(-1, 1) == jnp.arange(up.shape[0]), axis=0, dtype=jnp.int32)
    hidden = jax.nn.relu(jax.lax.ragged_dot(x[order // k], up, sizes))
    y = jax.lax.ragged_dot(hidden, down, sizes)[jnp.argsort(order, stable=True)]
    return jnp.sum(y.reshape(x.shape[0], k, -1) * weight[..., None].astype(y.dtype), axis=1)


class SparseExperts(nnx.Module):
    """A mixture of experts: :func:`noisy_top_k`, :func:`sparse_experts` (Shazeer et al. 2017, arXiv:1701.06538).

    ``experts (in + out) hidden + 2 in experts`` numbers; an example meets ``k`` experts.

    Args:
      in_features: that come.
      out_features: that go.
      hidden_features: of an expert.
      experts: how many there are.
      k: how many an example meets.
      kernel_init: of ``up`` and ``down``; gates begin with zeros, as in the paper.
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Raises:
      ValueError: for a ``k`` out of range.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> layer = jc.nn.SparseExperts(8, 4, 16, experts=4, k=2, rngs=nnx.Rngs(0))
      >>> y, loss = layer(jnp.ones((5, 8)), key=jax.random.key(0))
      >>> y.shape, loss.shape
      ((5, 4), ())
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: int,
        *,
        experts: int,
        k: int,
        kernel_init: Callable[..., Any] = lecun_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if not 1 <= k <= experts:
            raise ValueError(f"SparseExperts: found k {k} of {experts} experts, expected 1 to {experts}")
        keys = [jax.random.split(rngs.params(), experts) for _ in range(2)]
        shapes = (in_features, hidden_features), (hidden_features, out_features)
        made = [jax.vmap(lambda k, s=s: kernel_init(k, s, param_dtype))(ks) for ks, s in zip(keys, shapes, strict=True)]
        self.up, self.down = map(nnx.Param, made)
        self.gate, self.noise = (nnx.Param(jnp.zeros((in_features, experts), param_dtype)) for _ in range(2))
        self.k = k

    def __call__(self, x: jax.Array, key: jax.Array | None = None, dense: bool = False) -> tuple[jax.Array, jax.Array]:
        """``(outputs, loss)``: the balance of importance and load is the loss; a key in training.

        Args:
          x: (..., in_features).
          key: of the noise.
          dense: whether all experts run.
        """
        flat = x.reshape(-1, x.shape[-1])
        gates, load = noisy_top_k(flat @ array(self.gate), self.k, flat @ array(self.noise), key)
        y = sparse_experts(flat, gates, array(self.up), array(self.down), self.k, dense)
        return y.reshape(*x.shape[:-1], -1), balance_loss(gates.sum(0)) + balance_loss(load)
