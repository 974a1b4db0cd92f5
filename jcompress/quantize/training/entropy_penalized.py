"""Training for the size of the coded file: rate as a loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method, PyTree
from jcompress.formats import Latent


@dataclasses.dataclass(frozen=True)
class EntropyPenalized(Method):
    """Integer weights, their step and the density that codes them, all learned (Oktay et al. 2020, arXiv:1906.06624).

    ``compress`` gives nodes to train (:class:`jcompress.formats.Latent`), to whose loss :func:`rate` is added:
    ``loss + price * rate(tree, key)``. ``finalize`` gives integers, ordinary ``Quantized`` nodes, and ``jc.save(...,
    coded=True)`` stores them in about the bits that the rate said. The step starts where the largest weight has a
    given number of steps, the density at a mixture that spans the weights.

    Attributes:
      levels: integers from zero to the largest weight at the start, at most ``2**(bits - 1) - 1``.
      components: logistic distributions in the mixture.
      bits: bits of the codes at most, 2 to 16; the coded size does not depend on them.

    Raises:
      ValueError: for bits outside 2 to 16, levels that do not fit in them, or no components.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> T, w = jc.quantize.training, {"w": jax.random.normal(jax.random.key(0), (64, 64))}
      >>> tree = jc.compress(w, jc.plan(w, [("w", T.EntropyPenalized())]))
      >>> bits = float(T.rate(tree, jax.random.key(1))) / 64**2
      >>> abs(bits - jc.nbits(jc.finalize(tree), coded=True) / 64**2) < 0.3
      True
    """

    levels: int = 15
    components: int = 3
    bits: int = 8

    def __post_init__(self) -> None:
        if self.components < 1 or not 2 <= self.bits <= 16 or not 1 <= self.levels < 2 ** (self.bits - 1):
            raise ValueError(
                f"EntropyPenalized: found levels={self.levels}, components={self.components}, bits={self.bits}; "
                "expected 2 to 16 bits, levels that fit in them, and at least one component"
            )

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Latent:
        """The node for one array."""
        node = Latent(None, None, None, int(self.bits), int(self.levels), int(self.components))
        return node.project(jnp.copy(w), context.where)


def rate(tree: PyTree, key: jax.Array | None = None) -> jax.Array:
    """The bits that the integers of a tree take by their learned densities: a term for a loss.

    Args:
      tree: any pytree; nodes :class:`jcompress.formats.Latent` count, also inside others.
      key: for uniform noise in place of rounding, which makes it a bound that has a gradient; without one, the values
        are taken as they are.

    Returns:
      Bits, float32, a scalar; 0 without such nodes.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = {"w": jnp.zeros((8, 8))}
      >>> tree = jc.compress(w, jc.plan(w, [("w", jc.quantize.training.EntropyPenalized())]))
      >>> float(jc.quantize.training.rate(tree)) < 64
      True
    """
    nodes = [x for x in jax.tree.leaves(tree, is_leaf=_is_latent) if _is_latent(x)]
    keys: Any = [None] * len(nodes) if key is None else [jax.random.fold_in(key, i) for i in range(len(nodes))]
    return sum((node.bits(key=k) for node, k in zip(nodes, keys, strict=True)), start=jnp.zeros((), jnp.float32))


def _is_latent(x: Any) -> bool:
    return core.is_node(x) and isinstance(x, Latent)
