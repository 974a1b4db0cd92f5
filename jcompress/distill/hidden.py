"""Losses on features of one layer, or of a tree of layers: (batch, positions..., channels)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jcompress.core import PyTree
from jcompress.distill.arrays import applied, averaged, counted, pairs, positive, rows, same_structure, summed, unit

Maps = Callable[[jax.Array], jax.Array] | PyTree


def layer_errors(student: PyTree, teacher: PyTree, where: jax.Array | None = None) -> jax.Array:
    """The sum over layers of the mean squared distance of what they put out: ``sum_l mean (s_l - t_l)**2``.

    The layer terms of self-distilled quantization (O'Neill & Dutta 2023, arXiv:2307.05972), in which the teacher is the
    same network in full precision: errors of rounding are met in each layer before they add up with depth. Its loss is
    ``task + alpha * soft_targets(logits, teacher_logits) + beta * layer_errors(layers, teacher_layers)``. No gradient
    reaches the teacher.

    Args:
      student: a pytree of arrays: hidden states, attention, whatever layers put out.
      teacher: the same of the teacher, of equal shapes.
      where: booleans or weights of the positions, by leading axes of every array; all count by default.

    Returns:
      A float32 scalar, 0 where the two agree.

    Raises:
      ValueError: for trees or shapes that differ.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> float(jc.distill.layer_errors([jnp.ones(4), jnp.zeros(2)], [jnp.zeros(4), jnp.array([2.0, 0.0])]))
      3.0
    """
    found = pairs("layer_errors", student, teacher)
    return summed(averaged(jnp.square(counted(s - t, where)), where) for s, t in found)


def cosine_errors(student: PyTree, teacher: PyTree, where: jax.Array | None = None) -> jax.Array:
    """One less the cosine of each position's features, a sum over layers (DistilBERT; Sanh et al. 2019, 1910.01108).

    ``sum_l mean (1 - cos(s_l, t_l))``, the cosine over the last axis, 0 where one of both is zero.

    Args:
      student: features (..., channels), or a pytree of them.
      teacher: the same of the teacher, of equal shapes.
      where: booleans or weights of the positions, by leading axes; all count by default.

    Returns:
      A float32 scalar, 0 where the two have one direction.

    Raises:
      ValueError: for trees or shapes that differ.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> float(jc.distill.cosine_errors(jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 1.0]])))
      1.0
    """
    found = pairs("cosine_errors", student, teacher)
    cosines = (jnp.sum(unit(counted(s, where)) * unit(t), axis=-1) for s, t in found)
    return summed(averaged(1 - x, where) for x in cosines)


def patient(student: PyTree, teacher: PyTree, where: jax.Array | None = None) -> jax.Array:
    """Squared distance of directions, a sum over layers (patient distillation; Sun et al. 2019, arXiv:1908.09355).

    ``sum_l mean || s_l / ||s_l|| - t_l / ||t_l|| ||**2`` over the last axis. In the paper the features are those of the
    first token, and :func:`layer_map` says which of the teacher's layers they follow.

    Args:
      student: features (..., channels), or a pytree of them.
      teacher: the same of the teacher, of equal shapes.
      where: booleans or weights of the positions, by leading axes; all count by default.

    Returns:
      A float32 scalar, 0 where the two have one direction.

    Raises:
      ValueError: for trees or shapes that differ.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> float(jc.distill.patient(jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 1.0]])))
      2.0
    """
    found = pairs("patient", student, teacher)
    distances = (jnp.sum(jnp.square(unit(counted(s, where)) - unit(t)), axis=-1) for s, t in found)
    return summed(averaged(x, where) for x in distances)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Regressor:
    """A learned map from the student's features to the shape of the teacher's: a convolution without padding.

    That of FitNets (Romero et al. 2015, arXiv:1412.6550). Train it beside the student: it is a pytree of arrays, and a
    function.

    Attributes:
      kernel: (window..., student channels, teacher channels).
      bias: (teacher channels,).

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.distill.Regressor(jnp.ones((2, 3)), jnp.zeros(3))(jnp.ones((1, 2))).tolist()
      [[2.0, 2.0, 2.0]]
    """

    kernel: jax.Array
    bias: jax.Array

    def __call__(self, features: jax.Array) -> jax.Array:
        """Features (batch, positions..., channels) of the teacher's shape."""
        window = self.kernel.shape[:-2]
        if all(size == 1 for size in window):
            return features @ self.kernel.reshape(self.kernel.shape[-2:]) + self.bias
        places = "DHW"[-len(window) :]
        numbers = (f"N{places}C", f"{places}IO", f"N{places}C")
        ones = (1,) * len(window)
        wide = jnp.result_type(features, self.kernel)
        features, kernel = features.astype(wide), self.kernel.astype(wide)
        return jax.lax.conv_general_dilated(features, kernel, ones, "VALID", dimension_numbers=numbers) + self.bias


def regressors(student: PyTree, teacher: PyTree, *, key: jax.Array) -> PyTree:
    """A :class:`Regressor` for each array of features (FitNets; Romero et al. 2015, arXiv:1412.6550).

    The window is as wide as it must be without padding, ``student - teacher + 1`` positions. Between equal shapes it
    begins as the identity, else with LeCun's variance.

    Args:
      student: features (batch, positions..., channels), a pytree of them, or their shapes.
      teacher: the same of the teacher.
      key: of the kernels.

    Returns:
      A tree like ``student`` of regressors.

    Raises:
      ValueError: for trees of other structure, or fewer positions than the teacher has.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> maps = jc.distill.regressors(jnp.ones((4, 8, 8, 3)), jnp.ones((4, 6, 6, 5)), key=jax.random.key(0))
      >>> maps.kernel.shape, maps(jnp.ones((4, 8, 8, 3))).shape
      ((3, 3, 3, 5), (4, 6, 6, 5))
    """
    if not same_structure(student, teacher):
        raise ValueError("regressors: the features of student and teacher are trees of other structure; give pairs")
    leaves, tree = jax.tree.flatten(student)
    keys = jax.random.split(key, max(1, len(leaves)))
    made = [_regressor(s.shape, t.shape, k) for s, t, k in zip(leaves, jax.tree.leaves(teacher), keys, strict=False)]
    return jax.tree.unflatten(tree, made)


def _regressor(ours: tuple[int, ...], theirs: tuple[int, ...], key: jax.Array) -> Regressor:
    window = tuple(s - t + 1 for s, t in zip(ours[1:-1], theirs[1:-1], strict=False))
    if len(ours) != len(theirs) or len(ours) < 2 or any(size < 1 for size in window) or len(window) > 3:
        raise ValueError(f"regressors: found features {ours} for the teacher's {theirs}; pool the larger ones first")
    if ours[1:] == theirs[1:]:
        kernel = jnp.eye(ours[-1], dtype=jnp.float32).reshape(*window, ours[-1], ours[-1])
    else:
        shape = (*window, ours[-1], theirs[-1])
        kernel = jax.random.normal(key, shape, jnp.float32) / math.sqrt(math.prod(shape[:-1]))
    return Regressor(kernel, jnp.zeros(theirs[-1], jnp.float32))


def hints(student: PyTree, teacher: PyTree, regressor: Maps | None = None) -> jax.Array:
    """Half the squared distance of the teacher's features from a map of the student's (FitNets, arXiv:1412.6550).

    ``sum_l mean ||r_l(s_l) - t_l||**2 / 2``, the norm over all that an example has (Romero et al. 2015). Hints are
    activations, and the regressor is learned with the student. The paper trains so up to the guided layer, and by
    :func:`soft_targets` afterwards.

    Args:
      student: features (batch, ...), or a pytree of them.
      teacher: the same of the teacher, of the shapes that the regressors give.
      regressor: a function, or a tree of functions, such as :func:`regressors` makes; the identity by default.

    Returns:
      A float32 scalar, 0 where the two agree.

    Raises:
      ValueError: for trees or shapes that differ.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> float(jc.distill.hints(jnp.ones((2, 3)), jnp.zeros((2, 4)), lambda x: x @ jnp.eye(3, 4)))
      1.5
    """
    found = pairs("hints", applied("hints", regressor, student), teacher)
    return summed(jnp.mean(jnp.sum(jnp.square(rows(s - t)), -1)) / 2 for s, t in found)


def factor_transfer(student: PyTree, teacher: PyTree, power: float = 1) -> jax.Array:
    """Distance of factors of unit length (Kim et al. 2018, arXiv:1802.04977): ``mean || t/||t|| - s/||s|| ||_p``.

    The teacher's factors are the middle of an autoencoder of its features, the paraphraser, trained before by
    :func:`layer_errors` of what it gives back; the student's come from a translator, trained with it.
    :func:`regressors` make such maps. A sum over layers.

    Args:
      student: factors (batch, ...), or a pytree of them.
      teacher: the same of the teacher, of equal shapes.
      power: ``p`` above, at least 1.

    Returns:
      A float32 scalar, 0 where the two have one direction.

    Raises:
      ValueError: for trees or shapes that differ, or a power below 1.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> float(jc.distill.factor_transfer(jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 1.0]])))
      2.0
    """
    if power < 1:
        raise ValueError(f"factor_transfer: found power {power}, expected 1 at least")
    found = [unit(rows(t)) - unit(rows(s)) for s, t in pairs("factor_transfer", student, teacher)]
    return summed(jnp.mean(_norm(x, power)) for x in found)


def _norm(x: jax.Array, power: float) -> jax.Array:
    if power == 1:
        return jnp.sum(jnp.abs(x), axis=-1)
    most = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    most = jnp.where(most > 0, most, 1)
    total = jnp.sum(jnp.abs(x / most) ** power, axis=-1)
    return most[:, 0] * jnp.where(total > 0, jnp.where(total > 0, total, 1) ** (1 / power), 0)


def activation_boundaries(
    student: PyTree, teacher: PyTree, margin: float | jax.Array = 1.0, regressor: Maps | None = None
) -> jax.Array:
    """Whether the same neurons fire, with a margin (Heo et al. 2019, arXiv:1811.03233).

    ``sum_l mean || [t > 0] relu(m - s) + [t <= 0] relu(m + s) ||**2`` of what enters the activation functions. How
    strongly the teacher's fire does not count: only the sides of the boundary, which are what separates classes.

    Args:
      student: values before the activation function (batch, ...), or a pytree of them.
      teacher: the same of the teacher.
      margin: ``m`` above.
      regressor: a function of the student's features, or a tree of functions; the identity by default.

    Returns:
      A float32 scalar, 0 where the student is on the teacher's side by the margin everywhere.

    Raises:
      ValueError: for trees or shapes that differ, or a margin that is not positive.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> float(jc.distill.activation_boundaries(jnp.array([[0.5, -3.0]]), jnp.array([[7.0, -0.1]])))
      0.25
    """
    positive("activation_boundaries", "margin", margin)
    found = pairs("activation_boundaries", applied("activation_boundaries", regressor, student), teacher)
    missed = (jax.nn.relu(margin - jnp.where(t > 0, s, -s)) for s, t in found)
    return summed(jnp.mean(jnp.sum(jnp.square(rows(x)), -1)) for x in missed)
