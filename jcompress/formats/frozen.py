"""Arrays that no optimizer touches."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import Compressed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Frozen(Compressed):
    """An array held bit for bit: its floats are kept as the integers of the same bits, and integers do not train.

    No gradient, momentum or weight decay reaches it, whatever the optimizer, since ``split`` leaves it on the held
    side.

    Attributes:
      bits: unsigned integers in the shape of the dense array, as wide as its floats.
      dtype: dtype of the dense array.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.Frozen.of(jnp.array([0.5, -2.0]))
      >>> node.materialize().tolist(), jax.tree.leaves(jc.split(node)[0])
      ([0.5, -2.0], [])
    """

    bits: Any
    dtype: np.dtype = dataclasses.field(default=np.dtype("float32"), metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("bits",)

    @classmethod
    def of(cls, w: jax.Array) -> Frozen:
        """Freeze a float array."""
        return cls(jax.lax.bitcast_convert_type(w, jnp.dtype(f"uint{8 * w.dtype.itemsize}")), np.dtype(w.dtype))

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        return jax.lax.bitcast_convert_type(self.bits, self.dtype)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Frozen:
        return self
