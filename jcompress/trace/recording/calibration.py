"""Statistics over many batches, of the activations and of the gradients of a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import apply, core, rules
from jcompress.core import PyTree
from jcompress.rules import Plan
from jcompress.trace.core import walk
from jcompress.trace.recording import gradients
from jcompress.trace.recording.observation import observe
from jcompress.trace.recording.statistics import OF_LOSS, Calibration, Stats, wanted

LARGEST_GRAM = 16_384

State = tuple[Calibration, dict[str, dict[str, jax.Array]]]


def calibrate(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    plan: Plan | None = None,
    *,
    where: Any = None,
    loss: Callable[..., Any] | None = None,
    statistics: Iterable[str] | None = None,
    per_example: bool = False,
    probes: int = 1,
    key: jax.Array | None = None,
    progress: bool = False,
) -> Calibration:
    """Run data through any JAX function and gather, for each parameter, what it meets.

    For a kernel ``W`` that meets activations ``x`` in ``y = x W``, ``gram`` is the sum of ``x x^T`` over all
    positions of all batches, so that a change ``dW`` moves the outputs by ``tr(dW^T gram dW)``, summed and squared.
    :class:`jcompress.trace.Stats` lists all statistics; :func:`jcompress.trace.observe` says how uses are counted.

    One function is compiled for each shape of a batch; memory is that of one batch and of the statistics, however
    many batches there are. Parameters and data may be sharded. For use inside ``jit``, see ``observe``.

    Args:
      fn: called as ``fn(params, *batch)``.
      params: a pytree of arrays: linen dictionaries, NNX state, or any other.
      batches: any iterable. A batch that is not a tuple is one argument.
      plan: gather what the plan's methods need, and nothing else. Without one: ``gram``, ``count``, ``sum``,
        ``absmax``, ``norm``, ``zeros``, ``outputs`` and ``counts``, for all parameters, but no ``gram`` of more than
        16,384 features.
      where: which positions count, so that padding does not, or how much each does: booleans or weights by the leading
        axes of the arguments, (batch,) or (batch, time); the same for all batches, or a function of the batch that
        gives them, ``where(*batch)``, or a list with one for each. Or weights for each parameter of its own, as
        :func:`jcompress.trace.position_weights` finds them from a loss. :func:`jcompress.trace.observe` says how
        positions are followed; a parameter whose positions cannot be is unread, with the reason. The loss is not
        weighed.
      loss: ``loss(params, *batch)``, a scalar, for ``grad`` (the mean gradient over batches), ``grad_square`` and
        ``hessian_diagonal``.
      statistics: gather these by name, whatever the plan needs, for all parameters that it does not keep dense.
      per_example: square the gradients of single examples, one after the other, instead of those of batches.
      probes: random vectors a batch for the Hessian's diagonal.
      key: PRNG key for those.
      progress: show a bar, by tqdm.

    Returns:
      A mapping from paths to :class:`jcompress.trace.Stats`, with ``.unread`` and ``.notes`` for the rest.

    Raises:
      ValueError: if there is no batch, the plan is for other parameters, what it needs cannot be gathered, a
        statistic needs the loss or the key, the function uses no parameter in a product, a parameter is compressed
        already, or an activation is NaN or infinite. The message names the path.
      ImportError: for ``progress`` without tqdm.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
      >>> stats = jc.calibrate(fn, params, [jnp.ones((4, 2)), jnp.ones((4, 2))])
      >>> stats["a"].gram.tolist(), int(stats["b"].count)
      ([[8.0, 8.0], [8.0, 8.0]], 8)
    """
    paths = [path for path, _ in rules.paths(params)]
    if plan is not None:
        apply.check_paths(paths, plan)
    paths = [path for path, _ in walk.leaves(params)]
    names = wanted(paths, plan, None if statistics is None else tuple(statistics))
    of_loss = {path: tuple(n for n in ns if n in OF_LOSS) for path, ns in names.items()}
    gradients.check(of_loss, loss, key)
    largest = LARGEST_GRAM if plan is None and statistics is None else None

    def once(params: PyTree, index: Any, mask: Any, *batch: Any) -> State:
        mask = where(*batch) if callable(where) else mask
        found = observe(fn, params, *batch, statistics=names, largest=largest, where=mask)[1]
        if not any(of_loss.values()):
            return found, {}
        assert loss is not None
        step_key = None if key is None else jax.random.fold_in(key, index)
        return found, gradients.gather(loss, params, batch, of_loss, per_example, probes, step_key)

    found, sums = _stream(once, params, _masked(_shown(batches, progress), where))
    found = _with_gradients(found, gradients.means(sums))
    _check_found(found, names, plan)
    _check_finite(found)
    return found


def _stream(once: Callable[..., State], params: PyTree, batches: Iterable[Any]) -> State:
    """The sum of ``once`` over batches; what is summed up is donated from batch to batch."""
    update = jax.jit(lambda state, *args: _both(state, once(*args)), donate_argnums=0)
    state: State | None = None
    for i, (batch, mask) in enumerate(batches):
        args = (params, i, mask, *(batch if isinstance(batch, tuple) else (batch,)))
        if state is None:
            # Where data is sharded, the first batch decides how the statistics are.
            start = jax.jit(once) if _is_sharded(args) else _zeros_like(once, args)
            state = start(*args)
            if _is_sharded(args):
                continue
        state = update(state, *args)
    if state is None:
        raise ValueError("calibrate: found no batch, expected at least one; a generator can be read only once")
    return state


def _masked(batches: Iterable[Any], where: Any) -> Iterator[tuple[Any, Any]]:
    """Each batch with its mask, if that is no function of the batch."""
    if where is None or callable(where):
        return ((batch, None) for batch in batches)
    if hasattr(where, "shape") or isinstance(where, Mapping):
        return ((batch, where) for batch in batches)
    return _paired(batches, where)


def _paired(batches: Iterable[Any], masks: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    try:
        yield from zip(batches, masks, strict=True)
    except ValueError as error:
        if "zip()" not in str(error):
            raise
        raise ValueError("where: found another number of masks than of batches; expected one for each") from None


def _zeros_like(once: Callable[..., State], args: tuple) -> Callable[..., State]:
    shapes = jax.eval_shape(once, *args)
    return lambda *_: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _is_sharded(tree: PyTree) -> bool:
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and core.is_concrete(x)]
    return any(len(x.sharding.device_set) > 1 for x in arrays)


def _both(a: State, b: State) -> State:
    return a[0].merge(b[0]), jax.tree.map(jnp.add, a[1], b[1])


def _with_gradients(found: Calibration, of_loss: Mapping[str, Mapping[str, jax.Array]]) -> Calibration:
    stats = dict(found.items())
    for path, fields in of_loss.items():
        stats[path] = dataclasses.replace(stats.get(path, Stats()), **fields)
    return Calibration(stats, found.unread, found.notes, found.levels)


def _shown(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('progress=True needs tqdm; install it with pip install "jcompress[experiments]"') from error
    return tqdm(batches, desc="calibrate", unit="batch")


def _check_found(found: Calibration, names: Mapping[str, tuple[str, ...]], plan: Plan | None) -> None:
    if names and not len(found) and plan is None:
        told = {**found.unread, **found.notes}
        first = next(iter(told.items()), ("params", "there are none"))
        raise ValueError(
            f"calibrate: no parameter gives statistics; {first[0]}: {first[1]}; expected fn(params, *batch) to "
            "multiply its first argument with the others"
        )
    for path, needed in names.items() if plan is not None else ():
        # The count comes along with what else is gathered; a leaf in no product has none, and a gradient needs none.
        asked = [name for name in needed if name != "count"] or needed
        missing = [name for name in asked if getattr(found.get(path), name, None) is None]
        if missing:
            reason = found.unread.get(path) or found.notes.get(path) or "it is used in another way"
            raise ValueError(
                f"{path}: {plan and plan[path]!r} needs {missing[0]!r}, which cannot be gathered: {reason}; keep it "
                f"dense with a rule ({path!r}, None) before"
            )


@jax.jit
def _finite(found: Calibration) -> list[Any]:
    return [[jnp.isfinite(x).all() for x in jax.tree.leaves(stats) if core.is_trainable(x)] for stats in found.values()]


def _check_finite(found: Calibration) -> None:
    if not all(map(core.is_concrete, jax.tree.leaves(found))):
        return
    for path, finite in zip(found, jax.device_get(_finite(found)), strict=True):
        if not all(finite):
            raise ValueError(
                f"{path}: found NaN or infinite values in what it meets, expected finite activations; look for the "
                "batch that gives them, with jax.debug_nans"
            )
