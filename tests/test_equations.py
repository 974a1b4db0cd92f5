"""No rule drops a parameter of an equation: each is read by a reading, or declared to say nothing of axes."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from equations import EQUATIONS

import jcompress as jc
from jcompress.trace import primitives
from jcompress.trace.core import flow, views
from jcompress.trace.core.kinds import Collective, Opaque
from jcompress.trace.coupled import dims as terms
from jcompress.trace.coupled import frames
from jcompress.trace.coupled.building import Build
from jcompress.trace.coupled.frames import Rule
from jcompress.trace.coupled.states import Hold, all_hold
from jcompress.trace.recording import meetings, roles


def words(*lines):
    return set(" ".join(lines).split())


# Primitives that this version of jax does not bind, or under another name; and those that need a program around.
ELSEWHERE = words(
    "all_gather_invariant broadcast check checkpoint closed_call copy_p core_call create_token custom_jvp_call_jaxpr",
    "custom_vjp_call_jaxpr dce_sink debug_print empty eq_to expand_dims inspect_sharding layout_constraint le_to lt_to",
    "mesh_cast mulhi pbroadcast pcast pgather pjit psum2 psum_invariant psum_scatter pvary random_gamma_grad remat",
    "scatter-sub scatter_add scatter_max scatter_min scatter_mul scatter_sub stack threefry2x32 unstack",
    "with_memory_space_constraint",
)
# What a rule need not read: a shape that it gives anew; what becomes of updates out of bounds, where the axes that
# they are counted along stay whole.
NOT_READ = {
    "shape": words("iota random_bits random_split rng_bit_generator rng_uniform"),
    "mode": words("scatter scatter-add scatter-mul scatter-max scatter-min"),
}


class Told(dict):
    """The parameters of an equation, which remember which of them were asked for by name."""

    def __init__(self, params):
        super().__init__(params)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.read.add(name)
        return super().get(name, default)

    def __contains__(self, name):
        return super().__contains__(name)


def equations(jaxpr):
    """All equations, those inside others too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for x in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(x, "jaxpr", x)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def alone(eqn, jaxpr):
    """A program of one equation."""
    ins = list(dict.fromkeys(v for v in eqn.invars if not hasattr(v, "val")))
    lone = jaxpr.replace(constvars=[], invars=ins, outvars=list(eqn.outvars), eqns=[eqn])
    return jax.extend.core.ClosedJaxpr(lone, ())


def read_flow(eqn, closed, side):
    """What calibration, execution and costs read of an equation of which one operand is a parameter."""
    kinds = [views.Activation()] * len(closed.jaxpr.invars)
    if side < len(kinds):
        kinds[side] = views.whole("w", closed.jaxpr.invars[side].aval.shape)
    (step,) = flow.Reading().body(closed, kinds).steps
    step.row.count(eqn)
    for view, place in roles.weights(step):
        try:
            met = step.flow.meeting(eqn, view, place)
        except meetings.UnreadError:
            continue
        meetings.use_of(met)
        met.laid_out(jnp.ones(eqn.invars[1 - place].aval.shape))
    if roles.is_lookup(step):
        meetings.rows_read(eqn, meetings.of_gather(eqn, step.ins[0]), jnp.zeros(eqn.invars[1].aval.shape, int))


def read_dimensions(closed):
    """What coupling reads of it."""
    build = Build(lambda eqn: primitives.row(eqn).rule, primitives.UNREAD.rule)
    ins = [terms.fresh(v.aval.shape) for v in closed.jaxpr.invars]
    frames.read_states(build.frame(closed, ins), [all_hold(d, Hold.ZERO) for d in ins])


def test_the_table_has_no_primitive_without_an_equation():
    assert set(primitives.ROWS) == set(EQUATIONS) | ELSEWHERE
    assert not set(EQUATIONS) & ELSEWHERE


@pytest.mark.parametrize("name", EQUATIONS)
def test_no_parameter_is_dropped(name):
    fn, *args = EQUATIONS[name]
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    eqn = next(e for e in equations(jaxpr) if e.primitive.name == name)
    eqn = eqn.replace(params=Told(eqn.params))
    row, closed = primitives.row(eqn), alone(eqn, jaxpr)
    if type(row.rule) is Rule and isinstance(row.flow, (Opaque, Collective)):
        return  # nothing is said of what it gives: all that it meets stays whole, and is in no product
    for side in (0, 1):
        read_flow(eqn, closed, side)
    read_dimensions(closed)
    left = set(eqn.params) - eqn.params.read - primitives.CARRIED
    left -= {parameter for parameter, names in NOT_READ.items() if name in names}
    assert not left, f"{name}: no rule reads {sorted(left)}; read it, or say in CARRIED that it moves nothing"


def test_a_parameter_that_moves_entries_is_never_declared_to_move_none():
    moving = words(
        "axes axis dimension dimensions dimension_numbers permutation start_indices limit_indices strides sizes reps",
        "padding padding_config window_strides lhs_dilation rhs_dilation window_dilation base_dilation mode",
        "broadcast_dimensions new_sizes slice_sizes fill_value feature_group_count batch_group_count group_offset",
        "fft_lengths operand_batching_dims ragged_dot_dimension_numbers reduction_dimension",
    )
    assert not primitives.CARRIED & moving


@pytest.mark.parametrize("mode", ["clip", "fill"])
def test_rows_that_are_not_there_count_as_they_are_read(mode):
    table, rows = jnp.arange(12.0).reshape(4, 3), jnp.array([[0], [2], [7], [-1], [2]])
    numbers = jax.lax.GatherDimensionNumbers((1,), (0,), (0,))

    def fn(p, rows):
        return jax.lax.gather(p["w"], rows, numbers, (1, 3), mode=mode, fill_value=0)

    counts = jc.trace.observe(fn, {"w": table}, rows)[1]["w"].counts
    taken = np.asarray(fn({"w": table + 1}, rows))
    want = [int((taken == np.asarray(row + 1)).all(-1).sum()) for row in table]
    assert counts.tolist()[0] == want if counts.ndim > 1 else counts.tolist() == want
