"""What is trained: fresh parameters, the loss of a batch, and how well it is solved, of a decoder and of a ResNet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import cross_entropy
from experiments.models import resnet
from experiments.training.pipeline import Change, Example

PyTree = Any
Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and what it learns.

    Attributes:
      kind: of the data that it reads, ``"text"`` or ``"image"``.
      init: ``init(key) -> (params, extra)``; ``extra`` are arrays that training changes without gradients.
      loss: ``loss(params, extra, batch) -> (loss, extra)``.
      judge: ``judge(params, extra, batch) -> {"loss", "accuracy"}``, as it is used after training.
      change: of examples at random in training.
    """

    kind: str
    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    loss: Callable[[PyTree, PyTree, Batch], tuple[jax.Array, PyTree]]
    judge: Callable[[PyTree, PyTree, Batch], dict[str, jax.Array]]
    change: Change | None = None


def decoder(
    *, stacked: bool = True, remat: bool = True, dtype: str = "bfloat16", classes: int = 256, **fields: Any
) -> Task:
    """A language model; see :mod:`experiments.models.llama`.

    Args:
      stacked: layers with a leading axis, run by ``scan``.
      remat: compute each layer once more in the backward pass.
      dtype: of products; parameters are float32.
      classes: tokens.
      fields: of its config.
    """
    from experiments.models import llama

    config = llama.Config(vocab=classes, **fields)

    def logits(params: PyTree, batch: Batch) -> jax.Array:
        return llama.apply(params, batch["x"].astype(jnp.int32), config, remat=remat, dtype=jnp.dtype(dtype))

    return Task(
        kind="text",
        init=lambda key: (llama.init(key, config, stacked=stacked), {}),
        loss=lambda params, extra, batch: (cross_entropy(logits(params, batch), batch["y"]).mean(), extra),
        judge=lambda params, extra, batch: _judged(logits(params, batch), batch["y"]),
    )


def residual(
    *, depth: int = 20, width: int = 16, dtype: str = "bfloat16", momentum: float = 0.9, classes: int = 10
) -> Task:
    """A ResNet for small images; see :mod:`experiments.models.resnet`.

    Args:
      depth: 6 n + 2.
      width: channels of the first of three stages.
      dtype: of products; parameters and batch statistics are float32.
      momentum: of the running statistics.
      classes: outputs.
    """

    def loss(params: PyTree, extra: PyTree, batch: Batch) -> tuple[jax.Array, PyTree]:
        logits, found = resnet.apply(params, batch["x"], dtype=jnp.dtype(dtype))
        extra = jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, extra, found)
        return cross_entropy(logits, batch["y"]).mean(), extra

    def judge(params: PyTree, extra: PyTree, batch: Batch) -> dict[str, jax.Array]:
        return _judged(resnet.apply(params, batch["x"], extra, dtype=jnp.dtype(dtype))[0], batch["y"])

    return Task("image", lambda key: resnet.init(key, depth, width, classes), loss, judge, _augmented)


def _augmented(example: Example, rng: np.random.Generator) -> Example:
    return {**example, "x": resnet.augmented(example["x"][None], int(rng.integers(2**31)))[0]}


def _judged(logits: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    return {"loss": cross_entropy(logits, y).mean(), "accuracy": (logits.argmax(-1) == y).mean(dtype=jnp.float32)}


TASKS: dict[str, Callable[..., Task]] = {"decoder": decoder, "resnet": residual}


def build(options: Mapping[str, Any], classes: int | None = None) -> Task:
    """The task of ``config.model``: a ``name``, and what it takes; ``classes`` are those of the data, where known.

    Raises:
      ValueError: for a name or a field that there is not.
    """
    fields = dict(options)
    name = fields.pop("name", "")
    if name not in TASKS:
        raise ValueError(f"config.model.name: {name!r} is unknown; use one of {', '.join(TASKS)}")
    try:
        return TASKS[name](**({} if classes is None else {"classes": classes}), **fields)
    except TypeError as error:
        raise ValueError(f"config.model: {str(error).split('() ')[-1].split('__init__')[-1]}") from None
