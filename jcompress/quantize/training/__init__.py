"""Training of quantized networks: grids and levels that are learned, gradients through rounding, and optimizer state.

Weights: a method gives a node to train (:class:`LSQ`, :class:`DSQ`, :class:`DoReFa`, :class:`BinaryConnect`,
:class:`TTQ`), which ``jc.finalize`` turns into its storage form; or it is used with ``jc.simulate``, anew at each step
(:class:`jcompress.quantize.Int`, :class:`jcompress.quantize.Ternary`, :class:`QuantNoise`, :class:`Relaxed`).
Activations: functions, to be called in the model.

Straight-through training with ranges of each step is ``jc.simulate``. The penalty of curvature-aware training is
:func:`jcompress.prune.penalties.hessian_square_norm`. Self-distilled quantization is a loss: the task's, plus
``jc.distill.soft_targets`` against the logits of the dense network, plus ``jc.distill.layer_errors`` of its layers.
"""

from jcompress.quantize.training import dorefa
from jcompress.quantize.training.binary import BinaryConnect, clip_values, concave_penalty
from jcompress.quantize.training.clipped import pact, scaled_sign, sign_ste, wrpn, xnor, xnor_input_scales
from jcompress.quantize.training.dorefa import DoReFa
from jcompress.quantize.training.entropy_penalized import EntropyPenalized, rate
from jcompress.quantize.training.loss_error import elq
from jcompress.quantize.training.loss_scale import loss_scaled
from jcompress.quantize.training.noise import QuantNoise
from jcompress.quantize.training.relaxed import Relaxed
from jcompress.quantize.training.shifts import shifted_backward
from jcompress.quantize.training.soft import DSQ, assignment_entropy, soft_assign, temper
from jcompress.quantize.training.steps import LSQ, lsq, lsq_plus
from jcompress.quantize.training.ternary import TTQ, pruned_ternary

__all__ = [
    "DSQ",
    "LSQ",
    "TTQ",
    "BinaryConnect",
    "DoReFa",
    "EntropyPenalized",
    "QuantNoise",
    "Relaxed",
    "assignment_entropy",
    "clip_values",
    "concave_penalty",
    "dorefa",
    "elq",
    "loss_scaled",
    "lsq",
    "lsq_plus",
    "pact",
    "pruned_ternary",
    "rate",
    "scaled_sign",
    "shifted_backward",
    "sign_ste",
    "soft_assign",
    "temper",
    "wrpn",
    "xnor",
    "xnor_input_scales",
]
