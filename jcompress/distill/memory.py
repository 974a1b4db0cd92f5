"""A memory of embeddings, one for each training example: the state of contrastive distillation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jcompress.distill.arrays import fixed, unit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemoryBank:
    """Embeddings of unit length of every training example (CRD; Tian et al. 2020, arXiv:1910.10699).

    A state: carry it through the training step and save it beside the parameters. :func:`draw` takes negatives for
    :func:`contrastive`, :func:`remember` moves what a batch gave.

    Attributes:
      embeddings: float32 (examples, d).

    Example:
      >>> import jax, jcompress as jc
      >>> jc.distill.memory_bank(100, 8, key=jax.random.key(0)).embeddings.shape
      (100, 8)
    """

    embeddings: jax.Array


def memory_bank(examples: int, width: int, *, key: jax.Array) -> MemoryBank:
    """A memory that holds random directions.

    Args:
      examples: how many there are in training, 2 at least.
      width: of an embedding.
      key: of the directions.

    Returns:
      The :class:`MemoryBank`.

    Raises:
      ValueError: for fewer than 2 examples.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> bank = jc.distill.memory_bank(10, 4, key=jax.random.key(0))
      >>> bool(jnp.allclose(jnp.sum(bank.embeddings**2, -1), 1.0))
      True
    """
    if examples < 2:
        raise ValueError(f"memory_bank: found {examples} examples, expected 2 at least")
    return MemoryBank(unit(jax.random.normal(key, (examples, width), jnp.float32)))


def draw(bank: MemoryBank, indices: jax.Array, count: int, *, key: jax.Array) -> jax.Array:
    """Embeddings of other examples for each of a batch, drawn with replacement.

    Args:
      bank: the memory.
      indices: integers (batch,), which training examples the batch holds; none is drawn for itself.
      count: how many for each.
      key: of the draw.

    Returns:
      float32 (batch, count, d).

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> bank = jc.distill.MemoryBank(jnp.array([[1.0, 0.0], [0.0, 1.0]]))
      >>> jc.distill.draw(bank, jnp.array([0]), 1, key=jax.random.key(0)).tolist()
      [[[0.0, 1.0]]]
    """
    examples = len(bank.embeddings)
    steps = jax.random.randint(key, (len(indices), count), 1, examples)
    return bank.embeddings[(indices[:, None] + steps) % examples]


def remember(
    bank: MemoryBank, indices: jax.Array, embeddings: jax.Array, momentum: float | jax.Array = 0.5
) -> MemoryBank:
    """Move what the memory holds of some examples: ``unit(momentum * old + (1 - momentum) * unit(new))``.

    Args:
      bank: the memory.
      indices: integers (batch,), which training examples the batch holds, each once.
      embeddings: (batch, d) of them.
      momentum: how much stays.

    Returns:
      The memory afterwards.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> bank = jc.distill.MemoryBank(jnp.array([[1.0, 0.0], [0.0, 1.0]]))
      >>> jc.distill.remember(bank, jnp.array([0]), jnp.array([[0.0, 5.0]]), momentum=0.0).embeddings.tolist()
      [[0.0, 1.0], [0.0, 1.0]]
    """
    new = momentum * bank.embeddings[indices] + (1 - momentum) * unit(fixed(embeddings))
    return MemoryBank(bank.embeddings.at[indices].set(unit(new)))
