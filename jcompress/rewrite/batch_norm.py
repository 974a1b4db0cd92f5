"""Batch norm and compression: folding, and statistics gathered anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jcompress import rules
from jcompress.core import PyTree
from jcompress.layers import consumers, units
from jcompress.layers.groups import Group
from jcompress.rewrite import links


def fold_batch_norm(
    kernel: jax.Array,
    bias: jax.Array | float,
    scale: jax.Array | float,
    offset: jax.Array | float,
    mean: jax.Array,
    var: jax.Array,
    epsilon: float = 1e-5,
    axis: int = -1,
) -> tuple[jax.Array, jax.Array]:
    """The kernel and bias of a layer and the batch norm after it, in one (Jacob et al. 2018, arXiv:1712.05877).

    With ``g = scale / sqrt(var + epsilon)``: ``kernel * g`` and ``(bias - mean) * g + offset``. Exact, whatever the
    padding, for any kernel whose ``axis`` is that of the normalized channels: dense, convolution, depthwise and
    transposed convolution.

    Args:
      kernel: float array.
      bias: (channels,), or 0 for none.
      scale: (channels,), or 1.
      offset: (channels,), or 0: batch norm's bias.
      mean: (channels,), the running mean.
      var: (channels,), the running variance.
      epsilon: that of the batch norm. Flax has 1e-5.
      axis: the output channels of the kernel; -2 for a transposed convolution with ``transpose_kernel=True``.

    Returns:
      ``(kernel, bias)``, in the kernel's dtype.

    Raises:
      ValueError: if the axis has another length than the statistics.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress import rewrite
      >>> kernel, bias = rewrite.fold_batch_norm(
      ...     jnp.ones((2, 1)), 0.0, 2.0, 1.0, mean=jnp.array([3.0]), var=jnp.array([0.25]), epsilon=0.0)
      >>> kernel.ravel().tolist(), bias.tolist()
      ([4.0, 4.0], [-11.0])
    """
    if jnp.shape(mean) != (kernel.shape[axis],):
        raise ValueError(
            f"fold_batch_norm: found statistics of shape {jnp.shape(mean)}, expected ({kernel.shape[axis]},), the "
            f"length of axis {axis} of a kernel of shape {kernel.shape}"
        )
    gain = scale / jnp.sqrt(jnp.asarray(var, jnp.float32) + epsilon)
    along = jnp.expand_dims(gain, [i for i in range(kernel.ndim) if i != axis % kernel.ndim])
    moved = (bias - jnp.asarray(mean, jnp.float32)) * gain + offset
    return (kernel * along).astype(kernel.dtype), moved.astype(kernel.dtype)


def fold_batch_norms(variables: PyTree, groups: Mapping[str, Group], epsilon: float = 1e-5) -> PyTree:
    """Fold batch norms into the layers before them; the tree keeps its structure.

    The norm is left as the identity: mean 0, variance ``1 - epsilon``, scale 1. The constant goes to the layer's bias
    and the norm's becomes 0, or where the layer has none, to the norm's. So the model runs unchanged, in evaluation
    mode, and the kernels are those that quantization should see; a model without norms takes them by hand.

    Args:
      variables: a pytree that holds all of them, such as ``{"params": ..., "batch_stats": ...}``.
      groups: of ``jc.trace.coupling``, or by hand. Those that one kernel and one batch norm write are folded; others
        are passed over. On a residual stream several layers share a group: say each by hand,
        ``jc.trace.Groups.between(variables, {("conv/kernel", "norm/scale", "norm/bias", "norm/mean", "norm/var"):
        []})``.
        Vectors are told by their names: ``mean``, ``var``; ``scale``, ``weight`` or ``gamma``; ``bias``, ``beta`` or
        ``offset``, the layer's if it lies beside the kernel.
      epsilon: that of the norms. Flax has 1e-5.

    Returns:
      A pytree like ``variables``.

    Raises:
      ValueError: if no group is that of a kernel and a norm, for a path that is not there, or a constant that has no
        place.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> norm = {"mean": jnp.array([3.0]), "var": jnp.array([0.25]), "bias": jnp.zeros(1)}
      >>> tree = {"dense": {"kernel": jnp.ones((2, 1))}, "norm": norm}
      >>> groups = jc.trace.Groups.between(tree, {("dense/kernel", "norm/mean", "norm/var", "norm/bias"): []})
      >>> jc.rewrite.fold_batch_norms(tree, groups, epsilon=0.0)["norm"]["bias"].tolist()
      [-6.0]
    """
    found = rules.leaves(variables)
    norms = [norm for name, group in groups.items() if (norm := _norm_of(name, group, found))]
    if not norms:
        raise ValueError(
            "fold_batch_norms: no group is written by one kernel and one batch norm; say by hand what belongs "
            "together: jc.trace.Groups.between(variables, {(kernel, scale, bias, mean, var): []})"
        )
    for norm in norms:
        found |= _folded(norm, found, epsilon)
    return rules.rebuild(variables, found)


class _Norm(NamedTuple):
    """The paths of a layer and of the batch norm behind it, and the axis of the kernel's outputs."""

    kernel: str
    axis: int
    mean: str
    var: str
    bias: str | None
    scale: str | None
    offset: str | None


def _norm_of(name: str, group: Group, found: Mapping[str, Any]) -> _Norm | None:
    """The layer and the norm that write a group, if they alone do."""
    links.check(found, name, tuple(path for path, _ in group.producers))
    kernels, vectors = consumers.writers(group, found)

    def named(words: str) -> list[str]:
        return [path for path in vectors if consumers.is_named(path, words)]

    means, variances, scales = named("mean"), named("var|variance"), named("scale|weight|gamma")
    if len(kernels) != 1 or len(means) != 1 or len(variances) != 1 or len(scales) > 1:
        return None
    beside = [path for path in named("bias|beta|offset") if _parent(path) == _parent(kernels[0])]
    offsets = [path for path in named("bias|beta|offset") if path not in beside]
    axis = next(axis for path, axis in group.producers if path == kernels[0])
    return _Norm(kernels[0], axis, means[0], variances[0], *(next(iter(x), None) for x in (beside, scales, offsets)))


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or path.rpartition(".")[0]


def _folded(norm: _Norm, found: Mapping[str, Any], epsilon: float) -> dict[str, jax.Array]:
    """The variables of a layer and its norm, folded."""
    mean, place = found[norm.mean], norm.bias or norm.offset
    if place is None:
        raise ValueError(f"{norm.kernel}: neither the layer nor its norm has a bias to take the constant; give one")
    zero = jnp.zeros_like(mean)
    bias, offset = (zero if path is None else found[path] for path in (norm.bias, norm.offset))
    scale = 1.0 if norm.scale is None else found[norm.scale]
    kernel, moved = fold_batch_norm(found[norm.kernel], bias, scale, offset, mean, found[norm.var], epsilon, norm.axis)
    after = {norm.kernel: kernel, norm.mean: zero, norm.var: jnp.full_like(found[norm.var], 1 - epsilon)}
    after |= {path: value for path, value in ((norm.scale, jnp.ones_like(zero)), (norm.offset, zero)) if path}
    return {path: value.astype(found[path].dtype) for path, value in (after | {place: moved}).items()}


def reestimate(
    update: Callable[..., PyTree],
    statistics: PyTree,
    batches: Iterable[Any],
    mean: str = "mean",
    var: str = "var",
    momentum: float | None = None,
) -> PyTree:
    """Batch statistics of a whole set of data, for the parameters as they now are.

    A compressed layer puts out other values, so the running averages of training no longer hold, and the network looks
    worse than it is (Li et al. 2020, arXiv:2007.02491). They move affinely, ``new = momentum * old + (1 - momentum) *
    batch``, so one call gives a batch's own mean m and variance v. With n the examples of a batch, the mean of all is
    ``sum n m / sum n`` and their variance ``sum n (v + m**2) / sum n - mean**2``, the law of total variance: for the
    first norm exactly that of the data in one, for any split into batches. Behind it inputs are normalized batch by
    batch, so use batches as large as those of training.

    Args:
      update: ``update(statistics, *batch)`` gives the statistics after one batch in training mode, such as
        ``lambda s, x: model.apply({"params": p, "batch_stats": s}, x, train=True, mutable=["batch_stats"])[1][
        "batch_stats"]``. It is jitted.
      statistics: a pytree of running means and variances (biased ones, as Flax keeps).
      batches: tuples of arguments, or single arrays; the first axis of the first array is the examples.
      mean: the last name in the paths of running means.
      var: the last name in the paths of running variances, beside their means.
      momentum: of all statistics. By default a second call on the first batch tells it, to float accuracy.

    Returns:
      A pytree like ``statistics``. Leaves of other names are averaged over examples.

    Raises:
      ValueError: if there are no batches, a variance has no mean beside it, or a statistic does not move.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress import rewrite
      >>> def update(s, x):
      ...     return {"mean": 0.9 * s["mean"] + 0.1 * x.mean(0), "var": 0.9 * s["var"] + 0.1 * x.var(0)}
      >>> old = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
      >>> new = rewrite.reestimate(update, old, [jnp.array([[0.0], [2.0]]), jnp.array([[4.0]])])
      >>> [round(float(x[0]), 4) for x in (new["mean"], new["var"])]
      [2.0, 2.6667]
    """
    update, treedef = jax.jit(update), jax.tree.structure(statistics)
    zeros, ones = (jax.tree.map(lambda x, n=n: jnp.full_like(x, n), statistics) for n in (0, 1))
    paths = list(units.leaves(statistics))
    means = [_mean_of(path, paths, mean, var) for path in paths]
    shares, count = list[float](), 0
    found = [jnp.zeros(jnp.shape(x), jnp.float32) for x in jax.tree.leaves(statistics)]
    for batch in batches:
        args = batch if isinstance(batch, tuple) else (batch,)
        new = jax.tree.leaves(update(zeros, *args))
        if not shares:
            after = new if momentum is not None else jax.tree.leaves(update(ones, *args))
            shares = [_share(path, a, b, momentum) for path, a, b in zip(paths, new, after, strict=True)]
        n = jax.tree.leaves(args)[0].shape[0]
        count += n
        values = [x.astype(jnp.float32) / share for x, share in zip(new, shares, strict=True)]
        found = _averaged(found, values, means, n / count)
    if not count:
        raise ValueError("reestimate: there are no batches")
    old = jax.tree.leaves(statistics)
    return jax.tree.unflatten(treedef, [x.astype(y.dtype) for x, y in zip(found, old, strict=True)])


def _averaged(found: list[jax.Array], new: list[jax.Array], means: list[int | None], weight: float) -> list[jax.Array]:
    """The statistics of two sets of data in one; variances grow by how far the means lie apart."""
    between = [0 if i is None else weight * (1 - weight) * jnp.square(new[i] - found[i]) for i in means]
    return [x + weight * (y - x) + z for x, y, z in zip(found, new, between, strict=True)]


def _mean_of(path: str, paths: list[str], mean: str, var: str) -> int | None:
    """Where the mean of a variance stands, or None for what is no variance."""
    *parents, last = path.split("/")
    if last != var:
        return None
    beside = "/".join([*parents, mean])
    if beside not in paths:
        raise ValueError(f"{path}: found a variance without {beside}; name the statistics with mean= and var=")
    return paths.index(beside)


def _share(path: str, after_zero: jax.Array, after_one: jax.Array, momentum: float | None) -> float:
    """One minus the momentum, by default from what became of 0 and of 1."""
    if momentum is None:
        momentum = float(jnp.mean(after_one.astype(jnp.float32) - after_zero.astype(jnp.float32)))
    share = 1 - momentum
    if not share > 1e-6:
        raise ValueError(f"{path}: the statistic does not move; does update run in training mode?")
    return share
