"""Scores: how much each weight matters, by different lights. The larger value is kept.

A score is any callable ``(w, context) -> array of w's shape``. The same score serves masks
(:class:`jcompress.prune.ByScore`) and whole groups (:func:`jcompress.prune.structured.importance`).
"""

from jcompress.prune.scores.weights import (
    Score,
    evaluate,
    fisher,
    hessian,
    layer_adaptive,
    lookup,
    magnitude,
    movement,
    needs,
    random,
    reads,
    signed_taylor,
    since,
    squared,
    taylor,
)

__all__ = [
    "Score",
    "evaluate",
    "fisher",
    "hessian",
    "layer_adaptive",
    "lookup",
    "magnitude",
    "movement",
    "needs",
    "random",
    "reads",
    "signed_taylor",
    "since",
    "squared",
    "taylor",
]
