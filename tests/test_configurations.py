"""JAX configured strictly: what the package does under rank, dtype and NaN checks, x64 and no jit.

Optax's Adam, the default for what is no matrix, promotes dtypes itself, so that it cannot run under
dtype promotion "strict"; `ADAM` lists the doctests that run it.
"""

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
    "rank": lambda: jax.numpy_rank_promotion("raise"),
    "dtype": lambda: jax.numpy_dtype_promotion("strict"),
    "nans": lambda: jax.debug_nans(True),
    "x64": lambda: jax.enable_x64(True),
    "no jit": jax.disable_jit,
}
ADAM = {
    "backprop.train_step.train_step",
    "layers.states.check_state",
    "optimizers.checks.check_optimizer",
    "optimizers.muon.drop_muon",
    "optimizers.muon.muon",
    "sharding.on_mesh.on_mesh",
    "transforms.mvr.mvr_momentum",
    "transforms.per_layer.per_layer",
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
            with CONFIGURATIONS[name]():
                runner.run(test)
    stated = ADAM if name == "dtype" else set()
    assert {of: where for of, where in runner.failed.items() if of not in stated} == {}
    # One prints what Optax raises.
    assert all("/optax/" in where or "Input dtypes" in where for where in runner.failed.values())
    assert set(runner.failed) == stated
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
    "momentum": dm.momentum(0.9, nesterov=True),
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


def test_what_is_ours_steps_under_strict_promotion(strict_promotion):
    params = {"a": jnp.eye(3), "b": jnp.eye(3, 2)}
    layers = dm.layers_by_path(params, ["a", "b"])
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=0, steps_per_draw=2)
    for momentum in MOMENTA.values():
        tx = dm.drop_gluon(0.1, layers, roles=dm.Roles(has_head=False), momentum=momentum)
        tx = dm.accumulate(tx, sampler, should_skip_update_fn=optax.skip_not_finite)
        update = jax.jit(tx.update, static_argnames="depth")
        updates, _ = update(params, tx.init(params), params, depth=1, prev_params_grads=params)
        assert not updates["a"].any()


def test_numpy_parameters_of_another_width_do_not_warn():
    for tx in MOMENTA.values():
        state = tx.init({"w": np.ones((2, 3))})
        assert all(x.dtype != np.float64 for x in jax.tree.leaves(state))
