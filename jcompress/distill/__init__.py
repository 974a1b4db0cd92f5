"""Losses between a student and a teacher, and what else distillation needs: pure functions, state in the open.

A loss is called ``loss(student, teacher, ...)`` with what the networks put out, and gives a scalar to add to others.
No gradient reaches the teacher. Features are arrays or pytrees of them, one sum over all, (batch, positions...,
channels); they are computed in float32 at least. The guide ``docs/guides/distillation.md`` says which loss is for what.
"""

from jcompress.distill.adversarial import generator_errors, kdgan, kdgan_discriminator
from jcompress.distill.attention import attention_divergence, attention_transfer, value_relations
from jcompress.distill.bilevel import after_steps, dataset_distillation, weighted_teachers
from jcompress.distill.bundles import distilbert, followed, layer_map, tinybert
from jcompress.distill.distributions import neuron_selectivity, variational_information
from jcompress.distill.hidden import (
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
    probability_errors,
    soft_targets,
)
from jcompress.distill.memory import MemoryBank, draw, memory_bank, remember
from jcompress.distill.peers import co_teaching, codistillation, gated_logits, mean_soft_targets, mutual
from jcompress.distill.relations import (
    contrastive,
    correlation_congruence,
    darkrank,
    fsp,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from jcompress.distill.sequences import Beams, beam_search, sequence_errors
from jcompress.distill.synthesis import Moments, generator_prior, moment_errors, moments_of, synthesize
from jcompress.distill.teachers import (
    LangevinState,
    MeanTeacherState,
    generations,
    langevin,
    mean_teacher,
    normal_targets,
    teacher_params,
)

__all__ = [
    "Beams",
    "LangevinState",
    "MeanTeacherState",
    "MemoryBank",
    "Moments",
    "Regressor",
    "activation_boundaries",
    "after_steps",
    "attention_divergence",
    "attention_transfer",
    "beam_search",
    "co_teaching",
    "codistillation",
    "confidence_weighted",
    "contrastive",
    "correlation_congruence",
    "cosine_errors",
    "darkrank",
    "dataset_distillation",
    "distilbert",
    "draw",
    "ensemble_targets",
    "factor_transfer",
    "followed",
    "fsp",
    "gated_logits",
    "generations",
    "generator_errors",
    "generator_prior",
    "hints",
    "kdgan",
    "kdgan_discriminator",
    "langevin",
    "layer_errors",
    "layer_map",
    "logit_matching",
    "mean_soft_targets",
    "mean_teacher",
    "memory_bank",
    "moment_errors",
    "moments_of",
    "mutual",
    "neuron_selectivity",
    "noisy_logits",
    "normal_targets",
    "patient",
    "permuted_targets",
    "probability_errors",
    "regressors",
    "relational_angle",
    "relational_distance",
    "remember",
    "sequence_errors",
    "similarity_preserving",
    "soft_targets",
    "synthesize",
    "teacher_params",
    "tinybert",
    "value_relations",
    "variational_information",
    "weighted_teachers",
]
