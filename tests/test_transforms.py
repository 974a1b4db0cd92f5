"""Every optax transform has one interface, and its state gives what training held."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from transforms import GROUPS, KERNELS, RAMP, TRANSFORMS, network, projected

import jcompress as jc
from jcompress import rules
from jcompress.prune import dynamic, penalties, structured

every_row = pytest.mark.parametrize("row", TRANSFORMS, ids=lambda row: row.name)
STEPS = 5


def slope(w):
    """A gradient that is not zero where weights are, or nothing would grow by it."""
    return jnp.sin(w) + 0.1 * jnp.cos(jnp.arange(w.size).reshape(w.shape) + w)


def stepper(tx, **options):
    @functools.partial(jax.jit, **options)
    def step(params, state):
        updates, state = tx.update(jax.tree.map(slope, params), state, params, value=1.0)  # which nobody asked for
        return optax.apply_updates(params, updates), state

    return step


def run(tx, params, steps=STEPS):
    step, state = stepper(tx), tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@functools.cache
def program(row):
    """The optimizer of a row and its compiled step, for all tests that want it as it is."""
    tx = row.make(row.params())
    return tx, stepper(tx)


@functools.cache
def history(row):
    """Parameters and state before each step and after the last."""
    tx, step = program(row)
    found = [(row.params(), tx.init(row.params()))]
    for _ in range(max(STEPS, 3 * (row.every or 1))):
        found.append(step(*found[-1]))
    return found


def trained(row):
    return history(row)[STEPS]


def plain(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(plain(x), plain(y))


def assert_close(a, b):
    """Programs that XLA puts together differently may round differently."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(plain(x), plain(y), rtol=1e-4, atol=1e-5)


def kinds(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def test_every_public_transform_has_a_row():
    made = {
        path
        for path, value in public.objects().items()
        if inspect.isfunction(value) and "GradientTransformation" in str(inspect.signature(value).return_annotation)
    }
    assert made == {row.public for row in TRANSFORMS}


def test_arguments_stand_in_one_order():
    for row in TRANSFORMS:
        value = functools.reduce(getattr, row.public.split("."), jc)
        names = list(inspect.signature(value).parameters)
        assert inspect.signature(value).return_annotation == "optax.GradientTransformationExtraArgs"
        assert "optimizer" not in names, "a wrapped optimizer is called inner"
        if "inner" in names and row.public != "project":  # whose plan is first by design
            assert names[0] == "inner"
        what = [name for name in names if name not in ("inner", "every", "key")]
        if "every" in names:
            assert names.index(what[0]) < names.index("every")


@every_row
def test_the_state_keeps_its_structure_and_one_program_serves_all_steps(row):
    tx, step = program(row)
    kept = {str(kinds(found)) for found in history(row)}
    assert kept == {str(kinds((row.params(), jax.eval_shape(tx.init, row.params()))))}
    assert step._cache_size() == 1


@every_row
def test_the_nodes_of_a_state_are_what_it_holds(row, tmp_path):
    params, state = trained(row)
    tree = jc.nodes(params, state)
    held = tuple(path for path, x in rules.leaves(tree).items() if isinstance(x, jc.Compressed))
    if row.params is not network:
        assert_equal(tree, params)
        return
    assert held == row.holds
    dense = jc.materialize(tree)
    if row.every == 3:  # in between filters return; the nodes are without those of the last cut
        assert all(
            bool(((x == 0) | (x == y)).all()) for x, y in zip(*map(jax.tree.leaves, (dense, params)), strict=True)
        )
    elif row.answer:
        (assert_equal if row.exact else assert_close)(dense, params)
    else:
        assert_equal(dense, state.iterate)
    jc.save(tmp_path / "tree.jc", tree)
    assert_equal(jc.materialize(jc.load(tmp_path / "tree.jc")), dense)
    assert not held or jc.nbits(tree) < jc.nbits(params)


@every_row
def test_wrappers_change_nothing(row):
    finite = optax.apply_if_finite(optax.chain(optax.identity(), row.make(row.params())), 3)
    injected = optax.inject_hyperparams(lambda rate: optax.chain(finite, optax.scale(rate)))(rate=1.0)
    params, state = run(optax.named_chain(("first", optax.identity()), ("then", injected)), row.params())
    assert_close(params, trained(row)[0])
    assert_close(jc.nodes(params, state), jc.nodes(*trained(row)))


@pytest.mark.parametrize("name", ["masked", "partition"])
@every_row
def test_leaves_that_are_hidden_are_left_out(row, name):
    if name == "masked" and row.public not in ("project", "prune.dynamic.sparse"):
        pytest.skip("partition is made of masked")
    other = {"kernel": jnp.arange(1.0, 9.0).reshape(4, 2)}
    params = row.params() | {"other": other}
    tx = row.make(params)  # made for the whole tree
    mine = {key: key != "other" for key in params}
    if name == "masked":
        tx = optax.chain(optax.masked(tx, mine), optax.masked(optax.set_to_zero(), {k: not x for k, x in mine.items()}))
    else:
        tx = optax.partition({True: tx, False: optax.set_to_zero()}, mine)
    found, state = run(tx, params)
    assert_equal(found.pop("other"), other)
    assert_close(found, trained(row)[0])
    held = jc.nodes(found | {"other": other}, state)
    assert_equal(held.pop("other"), other)
    assert_close(held, jc.nodes(*trained(row)))


@every_row
def test_gradients_may_be_gathered_over_steps(row):
    tx = optax.MultiSteps(row.make(row.params()), 2)
    params, state = run(tx, row.params(), 2 * STEPS)
    assert_close(params, trained(row)[0])
    assert_close(jc.nodes(params, state), jc.nodes(*trained(row)))


@pytest.mark.parametrize("row", [row for row in TRANSFORMS if row.inject], ids=lambda row: row.name)
def test_numbers_may_be_injected(row):
    make, number = row.inject
    injected = optax.inject_hyperparams(make)(x=number)
    params = row.params()
    state = injected.init(params)
    assert_close(run(injected, params, 3)[0], run(make(number), params, 3)[0])
    state.hyperparams["x"] = jnp.float32(1.01 * number)
    step = stepper(injected)
    for _ in range(2):
        params, state = step(params, state)
    assert step._cache_size() == 1


@every_row
def test_parameters_and_state_may_be_donated(row):
    tx = row.make(row.params())
    step = stepper(tx, donate_argnums=(0, 1))
    for _ in range(2):  # keys and masks that the transform was given outlive the first training
        params = jax.tree.map(jnp.copy, row.params())
        state = tx.init(params)
        for _ in range(STEPS):
            params, state = step(params, state)
        assert_close(params, trained(row)[0])


@every_row
def test_sharded_parameters_stay_where_they_are(row):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def place(x):
        return jax.device_put(x, NamedSharding(mesh, P(*["d" if n == 8 else None for n in x.shape])))

    placed, tx = jax.tree.map(place, row.params()), row.make(row.params())
    params, _ = run(tx, placed)
    assert_close(params, trained(row)[0])
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def listening(seen):
    def update(updates, state, params=None, **extra):
        seen.append(extra)
        return updates, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


WRAPPERS = {
    "project": lambda inner, plan: jc.project(plan, inner=inner),
    "sparse": lambda inner, plan: dynamic.sparse(inner, dynamic.Static(), plan),
    "deep_rewiring": lambda inner, plan: dynamic.deep_rewiring(inner, plan, key=jax.random.key(0), learning_rate=0.1),
    "latent": lambda inner, plan: dynamic.latent(inner, dynamic.Surgery(0.1, 0.2)),
    "asap": lambda inner, plan: dynamic.asap(inner, 1.0, 0.1),
    "moments": lambda inner, plan: jc.quantize.moments(inner),
    "loss_scaled": lambda inner, plan: jc.quantize.training.loss_scaled(inner),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_optimizers_are_given_what_they_know(name):
    params, seen = network(), []
    plan = jc.plan(params, [(".*kernel", jc.prune.Magnitude(sparsity=0.5))])
    tx = WRAPPERS[name](listening(seen), plan)
    tx.update(params, tx.init(params), params, value=7)
    assert seen and all(extra["value"] == 7 for extra in seen)


@every_row
def test_training_goes_on_from_a_checkpoint(row):
    step = program(row)[1]
    stored = jax.tree.map(plain, history(row)[2])

    def restored(kept, like):
        is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(jnp.asarray(kept)) if is_key else jnp.asarray(kept)

    again = jax.tree.map(restored, stored, (row.params(), row.make(row.params()).init(row.params())))
    for _ in range(2, STEPS):
        again = step(*again)
    assert_equal(again, trained(row))


def test_checkpoints_hold_the_whole_state(tmp_path):
    params = network()
    plan = jc.plan(params, [(".*kernel", jc.prune.Magnitude(RAMP))])
    tx = optax.chain(optax.adam(0.1), penalties.proximal(penalties.L1(0.1), 0.1, match="norm/.*"), jc.project(plan, 2))
    params, state = run(tx, params, 2)
    with jc.io.Checkpoints(tmp_path, plan) as checkpoints:
        checkpoints.save(2, (params, state))
        again = checkpoints.restore((network(), tx.init(network())))
    step = stepper(tx)
    assert_equal(step(*again), step(params, state))


@pytest.mark.parametrize("row", [row for row in TRANSFORMS if not row.free], ids=lambda row: row.name)
def test_update_asks_for_the_parameters(row):
    tx, name = row.make(row.params()), row.public.split(".")[-1]
    name = "project" if name in ("moments", "loss_scaled") else name
    with pytest.raises(ValueError, match=rf"{name} needs the parameters: call tx.update\(grads, state, params\)"):
        tx.update(row.params(), tx.init(row.params()))


@pytest.mark.parametrize("row", [row for row in TRANSFORMS if row.every], ids=lambda row: row.name)
def test_what_happens_every_so_often_happens_on_the_same_steps(row):
    def changing(state):
        found = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "nodes"))
        state = next(x for x in found if hasattr(x, "nodes"))
        return jax.tree.leaves(getattr(state, "masks", getattr(state, "held", None)))

    states = [changing(state) for _, state in history(row)]
    pairs = enumerate(itertools.pairwise(states))
    moved = [i for i, (a, b) in pairs if any(bool((x != y).any()) for x, y in zip(a, b, strict=True))]
    assert moved and all(i % row.every == 0 for i in moved), moved


def test_it_must_happen_sometimes():
    with pytest.raises(ValueError, match="project: every=0 must be a positive number of steps"):
        jc.project(jc.plan(network(), []), every=0)


def test_a_ramp_is_read_from_its_first_step_to_its_last():
    tx = projected(jc.prune.Magnitude(RAMP), every=1)(network())
    params, state = network(), tx.init(network())
    step, zeros = stepper(tx), []
    for i in range(7):
        params, state = step(params, state)
        tree = jc.nodes(params, state)
        zeros.append(int((tree["a"]["kernel"].mask == 0).sum()))
        assert zeros[-1] == int((params["a"]["kernel"] == 0).sum()) == round(128 * float(RAMP(i)))
    assert zeros[0] == 0 and zeros[-1] == 96


# nodes, where something is amiss.


def test_a_transform_behind_project_is_found_out():
    params = network()
    plan = jc.plan(params, [(".*kernel", jc.prune.Magnitude(sparsity=0.5))])
    tx = optax.chain(jc.project(plan), optax.adam(0.1))
    wrong, state = run(tx, params, 3)
    with pytest.raises(ValueError, match=r"a/kernel: the parameters left the compressed set.* last link"):
        jc.nodes(wrong, state)
    state = tx.init(params)
    for _ in range(2):  # outside jit as well
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    with pytest.raises(ValueError, match=r"a/kernel: the parameters left the compressed set.* last link"):
        jc.nodes(params, state)


@pytest.mark.parametrize("method", [jc.prune.Magnitude(RAMP), jc.factorize.SVD(2), jc.quantize.Int(4)], ids=str)
def test_also_behind_a_ramp_factors_and_codes(method):
    plan = jc.plan(network(), [(".*kernel", method)])
    tx = optax.chain(jc.project(plan, every=2), optax.adam(0.1))
    wrong, state = run(tx, network(), 9)
    with pytest.raises(ValueError, match="a/kernel: the parameters left the compressed set"):
        jc.nodes(wrong, state)


def test_an_average_of_the_parameters_gets_their_zeros():
    params = network()
    tx = projected(jc.prune.Magnitude(sparsity=0.5), every=1000)(params)
    step, state, average = stepper(tx), tx.init(params), params
    for _ in range(10):
        params, state = step(params, state)
        average = optax.incremental_update(params, average, 0.1)
    assert float((average["a"]["kernel"] == 0).mean()) == 0.0
    found = jc.materialize(jc.nodes(average, state))["a"]["kernel"]
    np.testing.assert_array_equal(found == 0, params["a"]["kernel"] == 0)
    np.testing.assert_array_equal(found, jnp.where(params["a"]["kernel"] == 0, 0, average["a"]["kernel"]))


def test_what_cannot_be_told_is_refused_by_name():
    params = network()
    project = jc.project(jc.plan(params, [("a/kernel", jc.prune.Magnitude(sparsity=0.5))]))
    with pytest.raises(ValueError, match="found no transform of jcompress"):
        jc.nodes(params, optax.adam(0.1).init(params))
    twice = optax.chain(optax.sgd(0.1), project, structured.soft_filter(GROUPS, 0.5)).init(params)
    with pytest.raises(ValueError, match="a/kernel: found in a ProjectState and in a FilterState, expected one"):
        jc.nodes(params, twice)
    assert isinstance(jc.nodes(params, twice[1])["a"]["kernel"], jc.formats.Masked)
    with pytest.raises(ValueError, match="a/kernel: held in a ProjectState, but the parameters do not have it"):
        jc.nodes(params["a"], project.init(params))


def test_a_ticket_is_a_state_too():
    params = network()
    ticket = dynamic.lottery_ticket(lambda p, masks: p, params, rounds=2, rate=0.5, match=".*kernel")
    tree = jc.nodes(ticket.params, ticket)
    assert_equal(jc.materialize(tree), ticket.params)
    assert int(sum(x.mask.sum() for path, x in rules.leaves(tree).items() if path in KERNELS)) == 64


def test_narrow_updates_reach_zero_in_wide_parameters():
    params = network()
    plan = jc.plan(params, [(".*kernel", jc.prune.Magnitude(sparsity=0.5))])
    tx = optax.chain(optax.sgd(0.1), jc.project(plan))
    grads = jax.tree.map(lambda x: jnp.sin(x).astype(jnp.bfloat16), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert int((optax.apply_updates(params, updates)["a"]["kernel"] == 0).sum()) == 64


def test_an_nnx_optimizer_gives_its_nodes():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    plan = jc.plan(nnx.state(model, nnx.Param), [("kernel", jc.prune.Magnitude(sparsity=0.5))])
    optimizer = nnx.Optimizer(model, optax.chain(optax.adam(0.1), jc.project(plan)), wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    tree = jc.nodes(nnx.state(model, nnx.Param), optimizer.opt_state)
    assert int(rules.leaves(tree)["kernel"].mask.sum()) == 16
    np.testing.assert_array_equal(jc.materialize(tree)["kernel"][...], model.kernel[...])


# Nonzero.


def test_zeros_that_are_there_are_stored_for_little():
    w = jnp.where(jnp.arange(2048).reshape(64, 32) % 10 == 0, 1.5, 0.0)
    params = {"w": w, "whole": jnp.ones((4, 4)), "none": jnp.zeros((4, 4))}
    tree = jc.compress(params, jc.plan(params, [(".*", jc.prune.Nonzero())]))
    assert_equal(jc.materialize(tree), params)
    assert jc.nbits(tree["w"]) < w.size * 32 // 5
    chained = jc.plan(params, [("w", jc.chain(jc.prune.Nonzero(), jc.quantize.Int(8)))])
    small = jax.jit(lambda p: jc.compress(p, chained))(params)
    np.testing.assert_allclose(jc.materialize(small)["w"], w, rtol=1e-6)
    assert jc.nbits(small["w"]) < jc.nbits(tree["w"]) - 205 * 16
    assert jc.prune.Nonzero()(jnp.array([-0.0, jnp.nan, 1.0])).mask.tolist() == [False, True, True]


def test_under_project_they_stay():
    params = {"w": jnp.array([0.0, 2.0, 0.0, 1.0])}
    tx = optax.chain(optax.adam(0.5), jc.project(jc.plan(params, [("w", jc.prune.Nonzero())])))
    found, state = run(tx, params)
    assert [x == 0 for x in found["w"].tolist()] == [True, False, True, False]
    assert jc.nodes(found, state)["w"].mask.tolist() == [False, True, False, True]
