"""What the axes of each parameter are in the product that uses it, read from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jcompress.core import Layout, PyTree
from jcompress.trace.core import flow, walk
from jcompress.trace.core.flow import Body, Step
from jcompress.trace.core.kinds import Contraction, Lookup, operands
from jcompress.trace.core.layouts import forward
from jcompress.trace.core.views import Activation, Atom, Derived, Joined, Kind, View, is_activation, parameters
from jcompress.trace.recording import meetings
from jcompress.trace.recording.meetings import Meeting, UnreadError


class Layouts(Mapping):
    """``{path: Layout}`` of the parameters that could be read, and for the others the reason.

    Attributes:
      unread: the other paths, each with why it has no layout.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.ones((3, 2)), "bias": jnp.ones(3)}
      >>> found = jc.trace.layout(lambda p, x: x @ p["w"].T + p["bias"], params, jnp.ones((4, 2)))
      >>> found["w"], found.unread
      (Layout(inputs=(-1,), outputs=(-2,)), {'bias': 'in no product with an activation'})
    """

    def __init__(self, layouts: Mapping[str, Layout], unread: Mapping[str, str] | None = None) -> None:
        self._layouts, self.unread = dict(layouts), dict(unread or {})

    def __getitem__(self, path: str) -> Layout:
        if path in self.unread:
            raise KeyError(f"{path}: no layout: {self.unread[path]}")
        return self._layouts[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)

    def get(self, path: str, default: Any = None) -> Any:
        """The layout of a path, or the default."""
        return self._layouts.get(path, default)

    def __contains__(self, path: object) -> bool:
        return path in self._layouts

    def __repr__(self) -> str:
        return f"Layouts({len(self)} parameters, {len(self.unread)} unread)"

    def __str__(self) -> str:
        told = {**self._layouts, **self.unread}
        width = max(map(len, told), default=0)
        return "\n".join(f"{path:<{width}}  {what}" for path, what in told.items())


def layout(fn: Callable[..., Any], params: PyTree, *args: Any) -> Layouts:
    """Read what the axes of each parameter are in the product of ``fn(params, *args)`` that uses it; nothing is run.

    A parameter is followed through changes of layout, loops and branches to its first product with an activation. The
    table of an embedding is a product with one-hot vectors: its rows are inputs. Where it also multiplies, as the
    head of a language model that ties both, the product counts.

    Args:
      fn: any JAX function.
      params: a pytree of arrays, or of their shapes and dtypes.
      *args: the other arguments, alike.

    Returns:
      A mapping from paths to :class:`jcompress.Layout`, for ``jc.plan(params, rules, layout=...)``, with ``.unread``
      for the parameters that are in no product, or of which a part of an axis plays another role than the rest.

    Raises:
      ValueError: for a compressed node among the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> fn = lambda params, x: jnp.einsum("btd,hdk->bthk", x, params["query"])
      >>> jc.trace.layout(fn, {"query": jnp.ones((4, 16, 8))}, jax.ShapeDtypeStruct((1, 5, 16), "float32"))["query"]
      Layout(inputs=(-2,), outputs=(-3, -1))
    """
    program = walk.program(fn, params, *args)
    products: dict[str, Layout] = {}
    lookups: dict[str, Layout] = {}
    unread: dict[str, str] = {}
    for step in _steps(flow.of_program(program)):
        for path, reason in unread_weights(step):
            unread.setdefault(path, reason)
        for view, side in weights(step):
            assert isinstance(step.flow, Contraction)
            _read(products, unread, step.flow.meeting, step.eqn, view, side)
        if is_lookup(step):
            _read(lookups, unread, meetings.of_gather, step.eqn, step.ins[0])
    read = {**lookups, **products}
    left = {path: unread.get(path, "in no product with an activation") for path in program.paths if path not in read}
    return Layouts({path: read[path] for path in program.paths if path in read}, left)


def _steps(body: Body) -> Iterator[Step]:
    """All equations, those of bodies inside where they stand."""
    for step in body.steps:
        yield step
        for inner in step.bodies:
            yield from _steps(inner)


def _read(found: dict[str, Layout], unread: dict[str, str], meet: meetings.Meet, eqn: Any, view: Any, *of: Any) -> None:
    try:
        found.setdefault(view.path, of_meeting(meet(eqn, view, *of)))
    except UnreadError as reason:
        unread.setdefault(view.path, str(reason))


def weights(step: Step) -> list[tuple[View, int]]:
    """The parameters that an equation multiplies as they are, each with the operand that it is, or is a part of."""
    found: list[tuple[View, int]] = []
    for side, kind in _sides(step):
        if isinstance(kind, View):
            found.append((kind, side))
        elif isinstance(kind, Joined) and _outputs(step, kind, side) is not None:
            found += [(part, side) for part in kind.parts]
    return found


def unread_weights(step: Step) -> list[tuple[str, str]]:
    """The paths of other parameters in the product of an equation, each with why it cannot be read."""
    if not isinstance(step.flow, Contraction):
        return []
    found: list[tuple[str, str]] = []
    for side in (0, 1):
        mine, other = (operands(step.ins)[i] for i in (side, 1 - side))
        if isinstance(mine, Derived) and _meets(mine, other):
            found += [(path, _changed(name)) for path, name in mine.reasons]
    for side, kind in _sides(step):
        views = kind.parts if isinstance(kind, Joined) else (kind,)
        found += [(path, _changed(name)) for v in views if isinstance(v, View) for path, name in v.beside]
        if isinstance(kind, Joined) and _outputs(step, kind, side) is None:
            reason = "it is joined with others along an axis that is contracted or grouped"
            found += [(path, reason) for path in parameters([kind], lookups=True)]
    return found


def _changed(name: str) -> str:
    return f"it passes through {name!r} before it meets an activation; fold that into the weight first"


def _sides(step: Step) -> list[tuple[int, Kind]]:
    """The operands of a product that are parameters as they are, and meet something else."""
    if not isinstance(step.flow, Contraction):
        return []
    first, second = operands(step.ins)
    pairs = [(0, first, second), (1, second, first)]
    return [(side, a) for side, a, b in pairs if isinstance(a, (View, Joined)) and isinstance(b, (Activation, Derived))]


def _outputs(step: Step, kind: Joined, side: int) -> int | None:
    """The axis of the product along which the results of joined parameters stand side by side."""
    assert isinstance(step.flow, Contraction)
    return step.flow.of(step.eqn, side).outputs(kind.dim)


def _meets(mine: Derived, other: Kind) -> bool:
    """Whether a product of these is one of a parameter that cannot be read."""
    return isinstance(other, Activation) if mine.lookup else is_activation(other) or isinstance(other, (View, Joined))


def is_lookup(step: Step) -> bool:
    """Whether an equation reads rows of a parameter."""
    counts = isinstance(step.flow, Lookup) and step.flow.counts
    return counts and isinstance(step.ins[0], View) and any(map(is_activation, step.ins[1:]))


def of_meeting(met: Meeting) -> Layout:
    """The layout of a parameter in one product.

    Raises:
      UnreadError: where a part of an axis plays another role than the rest.
    """
    view, ndim = met.view, len(met.view.shape)
    scanned = [a for _, atoms in view.scanned for a in atoms]
    inputs, outputs = _axes(met.inputs), _axes(met.free)
    window = [axis for atoms in met.window for axis in _axes(atoms) if axis not in inputs]
    window = list(dict.fromkeys(window))
    own = _axes([*met.lead, *scanned])
    batch = [a for a in _axes([*met.lead, *scanned, *view.fixed]) if a not in outputs]
    loose = [a for a in range(ndim) if a not in {*inputs, *outputs, *window, *batch}]
    inputs = inputs or loose[-1:] * bool(window) or window
    window = [a for a in window if a not in inputs]
    if not inputs:
        raise UnreadError("no axis of it is contracted")
    # Axes of length 1 leave with a reshape; what is left over is as good as one output, or a stack of one layer.
    loose = [a for a in loose if a not in inputs]
    if not outputs and (met.window or not loose):
        outputs = [a.axis for a in met.lead if a.axis not in inputs][-1:]  # one output for each group
    outputs, loose = (outputs, loose) if outputs else (loose[-1:], loose[:-1])
    if not outputs:
        raise UnreadError("no axis of it gives outputs")
    batch = sorted({*batch, *loose} - {*outputs})
    named = [*inputs, *outputs, *window, *batch]
    if len(named) > ndim or len(set(named)) < ndim:
        twice = next(a for a in named if named.count(a) > 1)
        raise UnreadError(f"parts of its axis {twice - ndim} play different roles in the product")
    groups = _groups(met, scanned, [a for a in own if a in outputs], outputs)
    inputs, outputs, batch, window = ([a - ndim for a in axes] for axes in (inputs, outputs, batch, window))
    return Layout(inputs=inputs, outputs=outputs, batch=batch, window=window, groups=groups)


def _axes(atoms: Sequence[Atom]) -> list[int]:
    """The axes of a parameter over which atoms run, rising."""
    return sorted({a.axis for a in atoms if a.axis >= 0})


def _groups(met: Meeting, scanned: Sequence[Atom], split: Sequence[int], outputs: Sequence[int]) -> int:
    """How many groups the output axis has, each with a product of its own."""
    if not split:
        return 1
    ndim, slow = len(met.view.shape), [a for a in (*met.lead, *scanned) if a.axis == split[0]]
    fast = [a for a in met.free if a.axis == split[0]]
    if len(outputs) > 1:
        raise UnreadError(f"its axis {split[0] - ndim} has groups beside another axis of outputs")
    if min(a.step for a in map(forward, slow)) < max((a.step for a in fast), default=0):
        raise UnreadError(f"the groups of its axis {split[0] - ndim} are not one after the other")
    sizes = 1
    for a in slow:
        sizes *= a.size
    return sizes
