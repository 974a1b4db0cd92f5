"""The same function at smaller shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core, rules
from jcompress.core import PyTree
from jcompress.layers.groups import Groups
from jcompress.numeric import meshes
from jcompress.trace.core import walk
from jcompress.trace.coupled import choices
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled import kept as record
from jcompress.trace.coupled.cutting import Cutter, sliced
from jcompress.trace.coupled.frames import NOWHERE, Cut, Value, run
from jcompress.trace.coupled.groups import Coupled, Free, read


class Shrunk:
    """A function at smaller shapes: ``small(small_params, *args)``, pure, for any batch size.

    It is traced anew for arguments of new shapes, as ``jit`` does; wrap it in ``jax.jit``.

    Attributes:
      groups: of the original function.
      keep: ``{name: bool (size,)}``, what stays, of the groups that were cut.

    Raises:
      ValueError: when it is called, for parameters of other shapes than those it was made for.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> keep = {"up[1]": jnp.arange(8) < 4}
      >>> small_fn, small = jc.shrink(lambda p, x: x @ p["up"] @ p["down"], params, keep, jnp.ones((1, 3)))
      >>> isinstance(small_fn, jc.trace.Shrunk), small_fn(small, jnp.ones((1, 3))).tolist()
      (True, [[12.0, 12.0]])
    """

    def __init__(
        self, fn: Callable[..., Any], shapes: PyTree, coupled: Coupled, keep: Mapping[str, np.ndarray], free: Free
    ) -> None:
        self._fn, self._shapes, self._free = fn, shapes, free
        self.groups, self.keep = coupled.groups, dict(keep)
        cut = Cut(_kept(coupled, keep))
        self._axes = _axes(dict(zip(coupled.program.paths, coupled.params, strict=True)), cut)
        self._arguments = _axes(coupled.arguments, cut)
        self._lengths = {path: [d.size for d in dims] for path, dims in coupled.arguments.items()}
        self._known: dict[Any, tuple[Coupled, Cut]] = {}

    @property
    def widths(self) -> dict[str, int]:
        """The new length of each group that was cut, to build the model anew by hand.

        A model that is built at these widths is *not* equal under norms that divide by the width, such as
        LayerNorm and RMSNorm: this function still divides by the original one.
        """
        return {name: int(kept.sum()) for name, kept in self.keep.items()}

    @property
    def indices(self) -> dict[str, dict[int, np.ndarray]]:
        """``{path: {axis: positions that stay}}`` of every parameter that got smaller."""
        return {path: dict(axes) for path, axes in self._axes.items()}

    @property
    def kept(self) -> dict[str, dict[int, np.ndarray]]:
        """``{path: {axis: bool (length before,)}}``: saved beside the small parameters, it gives this function again.

        See :func:`jcompress.shrink`, which takes it for ``keep``.
        """
        shapes = {path: x.shape for path, x in walk.leaves(self._shapes)}
        return {
            path: {axis: np.isin(np.arange(shapes[path][axis]), index) for axis, index in axes.items()}
            for path, axes in self._axes.items()
        }

    def cut(self, tree: PyTree, like: PyTree | None = None) -> PyTree:
        """Slice whatever goes with the parameters: optimizer states, gradients, moving averages, masks.

        A leaf goes with the parameter whose path is part of its own. It is sliced where its shape is that parameter's
        full one, or that with lengths of 1, with axes in front, or with axes left out; so are accumulators of each axis
        (SM3), and all parameters side by side in a vector (``optax.flatten``). Factors of second moments (Adafactor)
        become those of the estimates that stay, or whole ones where the optimizer does not factor the new shape. What
        goes with no parameter, and what is cut already, stays.

        Args:
          tree: a pytree.
          like: what the leaves must look like afterwards, such as ``optimizer.init(small_params)`` or its shapes;
            then every leaf is compared, and what the optimizer factors is read off it.

        Returns:
          A pytree like ``tree``.

        Raises:
          ValueError: naming the leaves whose shapes do not tell what of them stays, or are not those of ``like``.
        """
        shapes = {path: tuple(x.shape) for path, x in walk.leaves(self._shapes)}
        return Cutter(shapes, self._axes).tree(tree, like)

    def cut_args(self, *args: Any) -> tuple:
        """Slice the arguments that ``free_args`` named, such as a cache; they are passed that small.

        Args:
          *args: arguments of the original function, or their shapes.

        Returns:
          The arguments of this one.
        """
        leaves = [sliced(x, self._arguments.get(path, {})) for path, x in rules.paths(args)]
        return jax.tree.unflatten(jax.tree.structure(args), leaves)

    def _full(self, args: tuple) -> tuple:
        """The shapes of the original function's arguments."""
        kept = {
            path: {a: np.isin(np.arange(self._lengths[path][a]), index) for a, index in axes.items()}
            for path, axes in self._arguments.items()
        }
        shapes = walk.shapes(args)
        for path, x in rules.paths(shapes):
            for axis, mask in kept.get(path, {}).items():
                if x.ndim <= axis or x.shape[axis] != mask.sum():
                    raise ValueError(
                        f"argument {path}: found shape {x.shape}, expected length {mask.sum()} on axis {axis}; "
                        "slice it with the function's .cut_args(*args)"
                    )
        return record.full_shapes(shapes, kept)

    def __call__(self, params: PyTree, *args: Any) -> Any:
        """The outputs of the masked function."""
        flat, _ = jax.tree.flatten(args)
        key = (jax.tree.structure(args), tuple(map(meshes.struct, flat)))
        if key not in self._known:
            self._known[key] = self._read(args)
        coupled, cut = self._known[key]
        leaves, tree = jax.tree.flatten((params, *args))
        if tree != coupled.program.in_tree:
            raise ValueError(f"the parameters have another structure: found {tree}, expected {coupled.program.in_tree}")
        self._check(coupled, cut, leaves)

        def small(leaves: list) -> dict[int, jax.Array]:
            values = []
            for x, dims, state in zip(leaves, coupled.frame.ins, coupled.frame.states, strict=True):
                value = Value(cut, dims, state, _unknown)
                value.known[NOWHERE] = jnp.asarray(x)
                values.append(value)
            return {i: v.at(NOWHERE) for i, v in enumerate(run(cut, coupled.frame, values))}

        types = dict(enumerate(map(meshes.struct, coupled.program.closed.out_avals)))
        outs = meshes.on_any_mesh(small, like=lambda _: types)(leaves)
        return jax.tree.unflatten(coupled.program.out_tree, list(outs.values()))

    def _read(self, args: tuple) -> tuple[Coupled, Cut]:
        coupled = read(self._fn, self._shapes, *self._full(args), free=self._free)
        return coupled, Cut(_kept(coupled, coupled.groups.checked(_matched(self.groups, coupled.groups, self.keep))))

    def _check(self, coupled: Coupled, cut: Cut, leaves: list) -> None:
        for path, x, dims in zip(coupled.program.paths, leaves, coupled.frame.ins, strict=False):
            expected = cut.shape(dims, NOWHERE)
            if jnp.shape(x) != expected:
                raise ValueError(
                    f"{path}: found shape {jnp.shape(x)}, expected {expected}; pass the parameters that shrink "
                    "gave, or slice others with the function's .cut(tree)"
                )


def _unknown(at: Any) -> Any:
    raise AssertionError("a parameter is zero wherever it is cut")


def _matched(groups: Groups, now: Groups, keep: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``keep`` under the names that the groups have for arguments of other shapes."""
    by_members = {frozenset(g.members): name for name, g in now.items()}
    found = {}
    for name, kept in keep.items():
        if name in now and now[name].members == groups[name].members and now[name].size == groups[name].size:
            found[name] = kept
            continue
        other = by_members.get(frozenset(groups[name].members))
        if other is None or now[other].size != groups[name].size:
            raise ValueError(
                f"{name}: arguments of these shapes tie other axes together than those it was shrunk with; "
                "shrink it with arguments of these shapes"
            )
        found[other] = kept
    return found


def _kept(coupled: Coupled, keep: Mapping[str, np.ndarray]) -> dict[terms.Dim, np.ndarray]:
    return {coupled.leaves[name]: np.flatnonzero(kept) for name, kept in keep.items()}


def _axes(values: Mapping[str, terms.Dims], cut: Cut) -> dict[str, dict[int, np.ndarray]]:
    """The positions that stay on each axis that gets smaller."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for path, dims in values.items():
        axes = {a: terms.kept_positions(d, cut.kept) for a, d in enumerate(dims) if cut.leaves((d,))}
        if axes:
            found[path] = axes
    return found


def shrink(
    fn: Callable[..., Any],
    params: PyTree,
    keep: Any,
    *args: Any,
    sparsity: float | None = None,
    multiple_of: int = 1,
    free_outputs: str | None = None,
    free_args: str | None = None,
) -> tuple[Shrunk, PyTree]:
    """A smaller function that equals the masked one, and its parameters.

    ``small_fn(small_params, *args)`` equals ``fn(jc.trace.mask(params, groups, keep), *args)`` to float tolerance,
    gradients included. The model is not rewritten: its equations run at smaller shapes, whatever sizes its code
    names. Loops stay loops, ``remat`` and custom derivatives stay what they were. Constants stay, so a norm still
    divides by its original width, which is what makes the two equal. Where masking makes the model divide zero by zero,
    as a norm of weights without an epsilon does, the masked one gives NaN and the small one does not.

    Args:
      fn: ``fn(params, *args)``, any JAX function.
      params: a pytree of arrays, or of their shapes where ``keep`` says what stays; the small ones are shapes then.
      keep: ``{name: bool (size,)}`` with the names of :func:`jcompress.trace.coupling`; True keeps. Or
        ``{name: float (size,)}``, scores of which the largest stay. Or a tree of masks like ``params``, which
        must cut all members of a group alike. Or None, which
        reads it off ``params``: what is zero in every member of a group goes. Or the ``kept`` of a function that was
        shrunk before; then ``params`` may be the small ones.
      *args: example arguments of the original sizes, or their shapes.
      sparsity: with scores, the fraction of each group that goes.
      multiple_of: sizes are rounded up to a multiple, such as 8 or 128, by keeping more indices, those of the
        largest weights first.
      free_outputs: as in :func:`jcompress.trace.coupling`.
      free_args: as there. Such arguments are passed smaller: ``small_fn.cut_args(*args)`` slices them.

    Returns:
      ``(small_fn, small_params)``. ``small_fn.widths`` are the new sizes, ``small_fn.indices`` the positions that stay,
      and ``small_fn.cut(tree)`` slices optimizer state and the like.

    Raises:
      ValueError: for a group that is unknown, cannot be cut, is cut unevenly, or of which nothing would stay. The
        message lists the parameters that must change together.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> params = {"up": jnp.ones((3, 8)), "bias": jnp.ones(8), "down": jnp.ones((8, 2))}
      >>> def mlp(p, x):
      ...     return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
      >>> small, cut = jc.shrink(mlp, params, {"up[1]": jnp.arange(8) < 5}, jnp.ones((4, 3)))
      >>> cut["down"].shape, small.widths, small(cut, jnp.ones((1, 3))).tolist()
      ((5, 2), {'up[1]': 5}, [[20.0, 20.0]])

      A file with what was kept is all that another process needs beside ``mlp``:

      >>> import os, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "small.jc")
      ...     size = jc.save(path, {"params": cut, "kept": small.kept})
      ...     saved = jc.load(path)
      >>> small, cut = jc.shrink(mlp, saved["params"], saved["kept"], jnp.ones((4, 3)))
      >>> cut["down"].shape, small(cut, jnp.ones((1, 3))).tolist()
      ((5, 2), [[20.0, 20.0]])
    """
    again = record.is_kept(keep, params)
    params = core.unsized(params)
    full = record.full_shapes(params, keep) if again else params
    free = Free(free_outputs, free_args)
    coupled = read(fn, full, *args, free=free)
    wanted = coupled.groups.checked(record.by_group(coupled.groups, keep)) if again else None
    if wanted is None:
        wanted = choices.wanted(params, coupled.groups, keep, sparsity)
    if multiple_of > 1:
        wanted = choices.rounded(params, coupled.groups, wanted, multiple_of)
    wanted = {name: kept for name, kept in wanted.items() if not kept.all()}
    small = Shrunk(fn, walk.shapes(full), coupled, wanted, free)
    leaves = [
        sliced(x, small.indices.get(path, {}) if jnp.shape(x) == jnp.shape(before) else {})
        for (path, x), (_, before) in zip(walk.leaves(params), walk.leaves(full), strict=True)
    ]
    return small, jax.tree.unflatten(jax.tree.structure(params), leaves)
