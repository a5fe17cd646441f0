"""JAX configured strictly: the package under rank, dtype and NaN checks, x64 and without jit."""

import contextlib
import doctest
import importlib
import pkgutil
import traceback

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm

CONFIGURATIONS = {
    "strict": (
        lambda: jax.numpy_rank_promotion("raise"),
        lambda: jax.numpy_dtype_promotion("strict"),
        lambda: jax.debug_nans(True),
    ),
    "x64": (lambda: jax.enable_x64(True),),
    "no jit": (jax.disable_jit,),
}


class Runner(doctest.DocTestRunner):
    """Runs doctests and keeps what fails: by name, where it was raised."""

    def __init__(self):
        super().__init__(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
        self.failed = {}

    def report_failure(self, out, test, example, got):
        self.failed[test.name.removeprefix("dropmuon_jax.")] = f"printed {got}"

    def report_unexpected_exception(self, out, test, example, exc_info):
        frames = [of.filename for of in traceback.extract_tb(exc_info[2])]
        raised_in = [of for of in frames if "/dropmuon_jax/" in of or "/optax/" in of]
        where = raised_in[-1] if raised_in else f"{exc_info[1]!r}"
        self.failed.setdefault(test.name.removeprefix("dropmuon_jax."), where)


@pytest.mark.deep
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_doctests_pass_in_every_configuration(name):
    runner, finder = Runner(), doctest.DocTestFinder()
    for module in pkgutil.walk_packages(dm.__path__, "dropmuon_jax."):
        if module.ispkg:
            continue
        for test in finder.find(importlib.import_module(module.name)):
            with contextlib.ExitStack() as configured:
                for configuration in CONFIGURATIONS[name]:
                    configured.enter_context(configuration())
                runner.run(test)
    assert runner.failed == {}
    assert runner.tries > 300


ZEROS = {
    "matrix": jnp.zeros((3, 2)),
    "column": jnp.array([[1.0, 0.0], [-2.0, 0.0], [0.5, 0.0]]),
    "row": jnp.array([[1.0, 0.3], [0.0, 0.0], [3.0, 0.5]]),
}
NORMS = {
    "sign": dm.norms.sign_norm(),
    "columns": dm.norms.column_norm(),
    "rows": dm.norms.row_norm(),
    "rms": dm.norms.rms_norm(),
    "euclidean": dm.norms.euclidean_norm(),
    "svd": dm.norms.spectral_norm(),
    "nuclear": dm.norms.nuclear_norm(),
} | {
    scale: dm.norms.spectral_norm(
        orthogonalize=dm.orthogonalize.newton_schulz(num_steps=2, preconditioning=scale)
    )
    for scale in ("frobenius", "schatten", "aol")
}
OF_AN_SVD = {"svd", "nuclear"}  # which has no derivative where singular values are equal


@pytest.mark.parametrize(
    "mode", [jax.jacrev, pytest.param(jax.jacfwd, marks=pytest.mark.deep)], ids=["rev", "fwd"]
)
@pytest.mark.parametrize("name", NORMS)
def test_derivatives_of_norms_are_zero_at_zero_and_finite_at_zero_rows(name, mode):
    norm = NORMS[name]

    @jax.jit
    @mode
    def jacobians(g):
        return norm.norm(g), norm.dual_norm(g), norm.sharp(g), norm.argmin(g)

    for where, g in ZEROS.items():
        if where == "matrix":
            assert not any(np.any(jacobian) for jacobian in jacobians(g))
        elif name not in OF_AN_SVD:
            chex.assert_tree_all_finite(jacobians(g))


MOMENTA = {
    "none": optax.identity(),
    "momentum": dm.momentum(0.9, nesterov=True, bias_correction=True),
    "mars": dm.transforms.mars_momentum(),
    "mvr": dm.mvr_momentum(variant=2, on_reactivate="decay"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.deep] * (name != "mvr")) for name in MOMENTA]
)
def test_derivatives_through_steps_are_finite_where_the_gradient_is_zero(name):
    """Through two steps of an LMO for each role, as in meta-learning. (Adam's has none: Optax.)"""
    shapes = {"hidden": (3, 2), "embed": (4, 2), "head": (2, 2), "bias": (2,)}
    params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    radii = {"hidden": 1.0, "embedding": 1.0, "head": 1.0, "bias": 1.0}
    tx = dm.scion(0.1, radii, momentum=MOMENTA[name])

    @jax.jit
    @jax.jacobian
    def jacobian(grads):
        state, moved = tx.init(params), params
        for _ in range(2):
            updates, state = tx.update(grads, state, moved, prev_params_grads=grads)
            moved = optax.apply_updates(moved, updates)
        return moved

    zeros = jax.tree.map(jnp.zeros_like, params)
    for grads in (zeros, zeros | {"embed": zeros["embed"].at[1].set(2.0)}):
        chex.assert_tree_all_finite(jacobian(grads))


STEPS = optax.cosine_decay_schedule(0.1, 9)
RADII = {"hidden": 1.0, "bias": 1.0}
BODY = dm.Roles(has_head=False)
OPTIMIZERS = {
    "drop_muon": lambda layers, sampler: dm.drop_muon(0.1, layers),
    "of schedules": lambda layers, sampler: dm.drop_muon(
        STEPS,
        layers,
        weight_decay=0.1,
        auxiliary_learning_rate=optax.exponential_decay(0.1, 3, 0.5),
    ),
    "of Optax's parts": lambda layers, sampler: dm.drop_muon(
        0.1, layers, momentum=optax.ema(0.9), auxiliary=optax.scale_by_lion()
    ),
    "drop_scion": lambda layers, sampler: dm.drop_scion(STEPS, layers, RADII, roles=BODY),
    "muon": lambda layers, sampler: dm.muon(0.1),
    "muon of Optax's parts": lambda layers, sampler: dm.muon(STEPS, momentum=optax.ema(0.9)),
    "record_gains": lambda layers, sampler: dm.record_gains(dm.drop_muon(0.1, layers), sampler),
} | {
    f"accumulated {name}": lambda layers, sampler, momentum=momentum: dm.accumulate(
        dm.drop_gluon(0.1, layers, roles=BODY, momentum=momentum),
        dm.DepthSampler(layers, dm.uniform_depth(), seed=0, steps_per_draw=2),
        should_skip_update_fn=optax.skip_not_finite,
    )
    for name, momentum in MOMENTA.items()
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("with_biases", [True, False])
def test_every_optimizer_steps_under_strict_promotion(name, with_biases, strict_promotion):
    params = {"a": {"w": jnp.eye(3)}, "b": {"w": jnp.eye(3, 2)}}
    if with_biases:
        params["b"]["bias"] = jnp.ones(2)
    layers = dm.layers_by_path(params, ["a", "b"])
    sampler = dm.DepthSampler(layers, dm.time_aware_depth([2.0, 1.0]), seed=0)
    tx = OPTIMIZERS[name](layers, sampler)
    depth = {} if name.startswith("muon") else {"depth": 1}
    update, state = jax.jit(tx.update, static_argnames="depth"), tx.init(params)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    for grads in (params, half):
        updates, state = update(grads, state, params, prev_params_grads=grads, **depth)
    assert updates["b"]["w"].any()
    assert updates["a"]["w"].any() == (not depth)


def test_numpy_parameters_of_another_width_do_not_warn():
    for tx in MOMENTA.values():
        state = tx.init({"w": np.ones((2, 3))})
        assert all(x.dtype != np.float64 for x in jax.tree.leaves(state))
