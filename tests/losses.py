"""The losses of distillation, one row each: inputs that fit, and what holds of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import distill

KEY = jax.random.key(0)


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Row:
    """A loss of a student and a teacher, with features of six examples for both.

    Attributes:
      loss: ``loss(student, teacher)``.
      student: what the student puts out.
      teacher: what the teacher puts out; the student's shapes if ``equal``.
      equal: whether a student that equals the teacher has the least loss.
      least: that loss, or None where it is not 0.
      corner: whether the slope jumps there.
      ordered: whether all is independent of the order of the examples.
    """

    loss: Callable[..., Any]
    student: Any
    teacher: Any
    equal: bool = True
    least: float | None = 0.0
    corner: bool = False
    ordered: bool = False


LOGITS = normal(0, 6, 5), normal(1, 6, 5)
SPACE = normal(2, 6, 3, 4, 5), normal(3, 6, 3, 4, 5)
WIDER = normal(4, 6, 3, 4, 7)
LAYERS = [normal(5, 6, 4), {"b": normal(6, 6, 3, 2)}], [normal(7, 6, 4), {"b": normal(8, 6, 3, 2)}]
HEADS = [normal(9, 6, 2, 4, 4), normal(10, 6, 2, 4, 4)], [normal(11, 6, 2, 4, 4), normal(12, 6, 2, 4, 4)]
SCALE = normal(13, 5)
BUNDLE = [
    {
        "embeddings": normal(20 + i, 6, 4, 3),
        "hidden": [normal(22 + i, 6, 4, 3), normal(24 + i, 6, 4, 3)],
        "attention": [normal(26 + i, 6, 2, 4, 4)] * 2,
        "logits": normal(28 + i, 6, 5),
    }
    for i in (0, 1)
]
FAR = jnp.sign(SPACE[1]) * (1 + jnp.abs(SPACE[1]))
LABELS = jnp.array([0, 1, 2, 3, 4, 0])


def _confidence(s, t):
    return distill.confidence_weighted(s, t, LABELS)


ROWS = {
    "soft_targets": Row(lambda s, t: distill.soft_targets(s, t, temperature=3.0), *LOGITS),
    "logit_matching": Row(distill.logit_matching, *LOGITS),
    "probability_errors": Row(distill.probability_errors, *LOGITS),
    "mean_soft_targets": Row(lambda s, t: distill.mean_soft_targets([s, s], t), *LOGITS),
    "weighted_teachers": Row(lambda s, t: distill.weighted_teachers(s, t[None], jnp.zeros(1)), *LOGITS),
    "kdgan": Row(lambda s, t: distill.kdgan(s, t, normal(14, 6, 5)), *LOGITS, equal=False, ordered=True),
    "generator_errors": Row(distill.generator_errors, *SPACE),
    "ensemble_targets": Row(
        lambda s, t: distill.ensemble_targets(s, jnp.stack([t, t]), jnp.array([1.0, 3.0])), *LOGITS
    ),
    "confidence_weighted": Row(
        lambda s, t: distill.confidence_weighted(s, t, LABELS), *LOGITS, equal=False, ordered=True
    ),
    "permuted_targets": Row(lambda s, t: distill.permuted_targets(s, t, key=KEY), *LOGITS, equal=False, ordered=True),
    "layer_errors": Row(distill.layer_errors, *LAYERS),
    "cosine_errors": Row(distill.cosine_errors, *LAYERS),
    "patient": Row(distill.patient, *LAYERS),
    "hints": Row(distill.hints, *LAYERS),
    "factor_transfer": Row(distill.factor_transfer, *LAYERS, corner=True),
    "factor_transfer_2": Row(lambda s, t: distill.factor_transfer(s, t, power=2), *LAYERS, corner=True),
    "activation_boundaries": Row(distill.activation_boundaries, SPACE[0], FAR),
    "variational_information": Row(lambda s, t: distill.variational_information(s, t, SCALE), *SPACE, least=None),
    "neuron_selectivity": Row(distill.neuron_selectivity, *SPACE),
    "attention_transfer": Row(distill.attention_transfer, *SPACE),
    "attention_divergence": Row(distill.attention_divergence, *HEADS),
    "value_relations": Row(distill.value_relations, *HEADS),
    "fsp": Row(distill.fsp, *((x, x[..., :2]) for x in SPACE)),
    "similarity_preserving": Row(distill.similarity_preserving, *LAYERS),
    "relational_distance": Row(distill.relational_distance, *LAYERS),
    "relational_angle": Row(distill.relational_angle, *LAYERS),
    "correlation_congruence": Row(distill.correlation_congruence, *LAYERS),
    "darkrank": Row(distill.darkrank, *LAYERS, equal=False),
    "contrastive": Row(distill.contrastive, *LOGITS, equal=False),
    "distilbert": Row(distill.distilbert, *((x, x[:, :3]) for x in LOGITS)),
    "tinybert": Row(distill.tinybert, *BUNDLE),
}
