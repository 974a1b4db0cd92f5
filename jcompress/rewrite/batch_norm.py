"""Batch norm and compression: folding, and statistics gathered anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import PyTree
from jcompress.layers import units


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


@dataclasses.dataclass(frozen=True)
class NormPaths:
    """Where the parameters of a batch norm lie, and of the layer in front of it.

    Attributes:
      kernel: the path of the kernel, such as ``params/Conv_0/kernel``.
      mean: of the running mean.
      var: of the running variance.
      bias: of the layer's bias, or None. One of ``bias`` and ``offset`` there must be.
      scale: of the norm's scale, or None.
      offset: of the norm's bias, or None.
      epsilon: that of the norm.
      axis: the output channels of the kernel.
    """

    kernel: str
    mean: str
    var: str
    bias: str | None = None
    scale: str | None = None
    offset: str | None = None
    epsilon: float = 1e-5
    axis: int = -1


def fold_batch_norms(variables: PyTree, norms: Iterable[NormPaths]) -> PyTree:
    """Fold batch norms into the layers before them; the tree keeps its structure.

    The norm is left as the identity: mean 0, variance ``1 - epsilon``, scale 1. The constant goes to the layer's bias
    and the norm's becomes 0, or where the layer has none, to the norm's. So the model runs unchanged, in evaluation
    mode, and the kernels are those that quantization should see; a model without norms takes them by hand.

    Args:
      variables: a pytree that holds all paths, such as ``{"params": ..., "batch_stats": ...}``.
      norms: a :class:`NormPaths` for each.

    Raises:
      ValueError: for a path that is not there, or a constant that has no place.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress import rewrite
      >>> tree = {"kernel": jnp.ones((2, 1)), "mean": jnp.array([3.0]), "var": jnp.array([0.25]), "bias": jnp.zeros(1)}
      >>> norm = rewrite.NormPaths("kernel", "mean", "var", offset="bias", epsilon=0.0)
      >>> rewrite.fold_batch_norms(tree, [norm])["bias"].tolist()
      [-6.0]
    """
    found = units.leaves(variables)
    for norm in norms:
        get = {name: _at(found, getattr(norm, name)) for name in ("kernel", "mean", "var", "bias", "scale", "offset")}
        zero = jnp.zeros_like(get["mean"])
        kernel, bias = fold_batch_norm(
            get["kernel"],
            zero if norm.bias is None else get["bias"],
            1.0 if norm.scale is None else get["scale"],
            zero if norm.offset is None else get["offset"],
            get["mean"],
            get["var"],
            norm.epsilon,
            norm.axis,
        )
        place = norm.bias or norm.offset
        if place is None:
            raise ValueError(f"{norm.kernel}: neither the layer nor its norm has a bias to take the constant; give one")
        after = {"kernel": kernel, "mean": zero, "var": jnp.full_like(get["var"], 1 - norm.epsilon)}
        after |= {"scale": jnp.ones_like(zero), "offset": zero}
        for name, value in after.items():
            if getattr(norm, name) is not None:
                found[getattr(norm, name)] = value.astype(get[name].dtype)
        found[place] = bias.astype(found[place].dtype)
    return units.replace(variables, found)


def _at(found: Mapping[str, Any], path: str | None) -> Any:
    if path is None:
        return None
    if path not in found:
        raise ValueError(f"{path}: there is no such variable; {units.closest(path, found)}")
    return core.dense(found[path])


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
