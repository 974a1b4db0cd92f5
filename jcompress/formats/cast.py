"""Arrays in a narrower float dtype."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np

from jcompress import core
from jcompress.core import Compressed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Cast(Compressed):
    """An array kept in another float dtype, such as bfloat16.

    Attributes:
      values: float array in the dtype ``stored``; trainable if that has 16 bits or more.
      stored: the dtype kept.
      dtype: dtype of the dense array.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.Cast(values=jnp.ones(4, jnp.bfloat16), stored=jnp.dtype("bfloat16"))
      >>> node.materialize().dtype.name, node.nbits()
      ('float32', 64)
    """

    values: Any
    stored: np.dtype = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(default=np.dtype("float32"), metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("values",)

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        return core.dense(self.values, key=key).astype(self.dtype)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Cast:
        return dataclasses.replace(self, values=core.refitted(self.values, w.astype(self.stored)))
