"""Losses between a student and a teacher, and what else distillation needs: pure functions, state in the open.

A loss is called ``loss(student, teacher, ...)`` with what the networks put out, and gives a scalar to add to others.
No gradient reaches the teacher. Features are arrays or pytrees of them, one sum over all, (batch, positions...,
channels); they are computed in float32 at least. The guide ``docs/guides/distillation.md`` says which loss is for what.
"""

from jcompress.distill.attention import attention_divergence, attention_transfer, value_relations
from jcompress.distill.bundles import distilbert, followed, layer_map, tinybert
from jcompress.distill.distributions import neuron_selectivity, variational_information
from jcompress.distill.features import (
    Regressor,
    activation_boundaries,
    cosine_errors,
    factor_transfer,
    hints,
    layer_errors,
    patient,
    regressors,
)
from jcompress.distill.logits import (
    confidence_weighted,
    ensemble_targets,
    logit_matching,
    noisy_logits,
    permuted_targets,
    soft_targets,
)
from jcompress.distill.relations import (
    contrastive,
    correlation_congruence,
    fsp,
    relational_angle,
    relational_distance,
    similarity_preserving,
)

__all__ = [
    "Regressor",
    "activation_boundaries",
    "attention_divergence",
    "attention_transfer",
    "confidence_weighted",
    "contrastive",
    "correlation_congruence",
    "cosine_errors",
    "distilbert",
    "ensemble_targets",
    "factor_transfer",
    "followed",
    "fsp",
    "hints",
    "layer_errors",
    "layer_map",
    "logit_matching",
    "neuron_selectivity",
    "noisy_logits",
    "patient",
    "permuted_targets",
    "regressors",
    "relational_angle",
    "relational_distance",
    "similarity_preserving",
    "soft_targets",
    "tinybert",
    "value_relations",
    "variational_information",
]
