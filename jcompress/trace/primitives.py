"""The rule of each primitive that ``coupling`` and ``shrink`` can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jcompress.trace.core import walk
from jcompress.trace.coupled.frames import (
    Rule,
    Site,
)
from jcompress.trace.coupled.rules.calls import Call, Remat, ShardMap
from jcompress.trace.coupled.rules.control import Cond, Scan, While
from jcompress.trace.coupled.rules.derivatives import CustomJVP, CustomVJP
from jcompress.trace.coupled.rules.lookups import DynamicSlice, DynamicUpdateSlice, Gather, Scatter
from jcompress.trace.coupled.rules.moves import (
    FIXED,
    IDENTITY,
    NARY,
    UNARY,
    Along,
    Broadcast,
    Concatenate,
    Drawn,
    Elementwise,
    Identity,
    Iota,
    Pad,
    Reshape,
    Slice,
    Split,
    Squeeze,
    Stack,
    Tile,
    Transpose,
    Window,
)
from jcompress.trace.coupled.rules.sums import COMBINE, Convolution, Dot, Reduce


def _params(*names: str) -> Callable[[Site], Sequence[int]]:
    def axes(site: Site) -> Sequence[int]:
        found = next(site.params[name] for name in names if name in site.params)
        return found if isinstance(found, (tuple, list)) else (found,)

    return axes


def _last(site: Site) -> Sequence[int]:
    return (site.params.get("axis", -1),)


_window = Window()
RULES: dict[str, Rule] = {
    **dict.fromkeys(IDENTITY, Identity()),
    **dict.fromkeys(FIXED, Rule()),
    **dict.fromkeys([*UNARY, *NARY], Elementwise()),
    **dict.fromkeys(["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"], Along(_params("axis"))),
    **dict.fromkeys(["argmax", "argmin"], Along(_params("axes"), drops=True)),
    **dict.fromkeys(COMBINE, Reduce()),
    **dict.fromkeys(["random_bits", "random_split", "rng_uniform"], Drawn()),
    **dict.fromkeys(["reduce_window_max", "reduce_window_min", "reduce_window_sum"], _window),
    **dict.fromkeys(["scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul"], Scatter()),
    "rev": Along(_params("dimensions")),
    "sort": Along(_params("dimension")),
    "top_k": Along(_last),
    "broadcast_in_dim": Broadcast(),
    "reshape": Reshape(),
    "transpose": Transpose(),
    "squeeze": Squeeze(),
    "slice": Slice(),
    "split": Split(),
    "concatenate": Concatenate(),
    "stack": Stack(),
    "tile": Tile(),
    "pad": Pad(),
    "iota": Iota(),
    "dot_general": Dot(),
    "conv_general_dilated": Convolution(),
    "gather": Gather(),
    "dynamic_slice": DynamicSlice(),
    "dynamic_update_slice": DynamicUpdateSlice(),
    **dict.fromkeys(walk.CALLS, Call()),
    **dict.fromkeys(walk.REMAT, Remat()),
    "custom_jvp_call": CustomJVP(),
    "custom_vjp_call": CustomVJP(),
    "custom_vjp_call_jaxpr": CustomVJP(),
    "scan": Scan(),
    "while": While(),
    "cond": Cond(),
    "shard_map": ShardMap(),
}
