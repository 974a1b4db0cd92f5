"""Examples from grain: in an order of their own each epoch, changed at random where wanted, a part for each process.

The iterator's position is a text that a checkpoint can keep. It says which examples come next whatever the number of
devices is, and of processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.data import DataError, Split
from experiments.training import meshes

Example = dict[str, np.ndarray]
Change = Callable[[Example, np.random.Generator], Example]


class Source:
    """What grain reads: examples by number.

    Args:
      split: arrays of examples and labels.
    """

    def __init__(self, split: Split) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> Example:
        return {"x": self._split.x[index], "y": self._split.y[index]}

    def __repr__(self) -> str:
        return f"Source({len(self)} examples)"


class Batches:
    """Batches on the devices of a mesh, without end, from a position that can be saved.

    Args:
      source: examples by number, ``{"x": ..., "y": ...}``; one of :class:`Source` or any of grain's.
      size: examples of a batch over all processes.
      parts: gradients are summed over so many parts of a batch, the first axis of the arrays.
      mesh: where they go.
      seed: of the order and of what is changed.
      change: ``change(example, rng)``, at random.

    Raises:
      DataError: if there are fewer examples than a batch has.
      ValueError: if a batch cannot be cut into as many parts as there are devices.
    """

    def __init__(
        self, source: Any, size: int, mesh: Mesh, *, parts: int = 1, seed: int = 0, change: Change | None = None
    ) -> None:
        import grain

        meshes.check_batch(size, parts, mesh)
        if len(source) < size:
            raise DataError(
                f"found {len(source)} examples, expected a batch of {size} or more; lower config.batch_size"
            )
        index, readers = meshes.reader(mesh)
        examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
        if change is not None:
            examples = examples.random_map(change)
        # Each reader takes its own rows of a batch, so a batch is the same whatever their number.
        batches = examples.batch(size // readers, drop_remainder=True)[index::readers]
        self._iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)))
        self._parts, self._sharding = parts, meshes.of_batch(mesh)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        return {name: placed(x, self._parts, self._sharding) for name, x in next(self._iterator).items()}

    @property
    def position(self) -> str:
        """Where it stands, as text."""
        return json.dumps(self._iterator.get_state(), sort_keys=True)

    @position.setter
    def position(self, text: str) -> None:
        self._iterator.set_state(json.loads(text))


def placed(x: np.ndarray, parts: int, sharding: Any) -> jax.Array:
    """This process's examples of a batch as a part of an array over all devices, (parts, examples, ...)."""
    return jax.make_array_from_process_local_data(sharding, x.reshape(parts, -1, *x.shape[1:]))


def in_order(split: Split, size: int, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """The whole batches of a split once, in its own order."""
    index, readers = meshes.reader(mesh)
    for start in range(0, len(split) - size + 1, size):
        part = split.take(slice(start + index * size // readers, start + (index + 1) * size // readers))
        yield {name: placed(x, 1, meshes.of_batch(mesh)) for name, x in (("x", part.x), ("y", part.y))}
