"""The bounds of the theory hold on problems whose smoothness in each layer's norm is known.

With a_i = ‖∇_i f‖*: a sharp step of size 1/L_i lowers f by at least Σ_{i active} a_i² / (2 L_i),
one of the adaptive radius by Σ_{i active} a_i² / (2 (L⁰_i + L¹_i a_i)).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm

# Compiling is most of the time. XLA rewrites and fuses as ever: only LLVM optimizes less.
pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = {"stem": (4, 6), "mid": (3, 2, 2, 5), "gain": (7,), "head": (5, 3)}
NORMS = {
    "stem": dm.norms.spectral_norm("rms_to_rms"),
    "mid": dm.norms.spectral_norm("scion"),
    "gain": dm.norms.rms_norm(),
    "head": dm.norms.sign_norm(),
}
NAMES = tuple(SHAPES)
DISTRIBUTIONS = {
    "full": dm.full_depth(),
    "uniform": dm.uniform_depth(),
    "arbitrary": dm.LayerDistribution(
        lambda num_layers: [
            (True, False, True, False),
            (False, True, False, True),
            (True, True, False, False),
        ],
        lambda step, num_layers: jnp.array([0.5, 0.3, 0.2]),
    ),
}
INCLUSION = {
    "full": np.ones(4),
    "uniform": np.array([0.25, 0.5, 0.75, 1.0]),
    "arbitrary": np.array([0.7, 0.5, 0.5, 0.3]),
}


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}


class LeastSquares:
    """½‖Σ_i B_i vec(X_i) - y‖²: layers that interact.

    ½‖Σ B_i g_i‖² ≤ Σ_i b/2 ‖B_i‖² ‖G_i‖_F², and ‖G‖_F² ≤ ‖G‖_(i)² times the largest ‖Z‖_F² in the
    unit ball, which every direction of full rank attains.
    """

    def __init__(self):
        rng = np.random.default_rng(0)
        self.maps = {
            name: jnp.asarray((i + 1) * rng.normal(size=(8, math.prod(shape))))
            for i, (name, shape) in enumerate(SHAPES.items())
        }
        self.target = jnp.asarray(10 * rng.normal(size=8))

    def __call__(self, params):
        images = [self.maps[name] @ params[name].reshape(-1) for name in NAMES]
        return 0.5 * jnp.sum((sum(images) - self.target) ** 2)

    def smoothness(self):
        """L_i, in the norm of each layer."""
        constants = {}
        for name, norm in NORMS.items():
            corner = norm.direction(random_tree(9)[name])
            operator = np.linalg.norm(np.asarray(self.maps[name]), 2)
            constants[name] = len(NAMES) * operator**2 * float(jnp.sum(corner**2))
        return constants

    infimum = 0.0  # eight equations, 91 unknowns


class HyperbolicCosines:
    """Σ_i cosh ⟨A_i, X_i⟩ with ‖A_i‖* = 1.

    |f''| ≤ 1 + |f'| along a layer's direction, so that for ‖G‖ ≤ 1 (Zhang et al., 2020,
    arXiv:2010.02519, Lemma A.3) f(X + G) ≤ f + ⟨∇f, G⟩ + ½(2 + (e - 1) a_i)‖G‖².
    """

    l0, l1 = 2.0, math.e - 1
    infimum = float(len(NAMES))

    def __init__(self):
        self.normals = {name: g / NORMS[name].dual_norm(g) for name, g in random_tree(5).items()}

    def __call__(self, params):
        products = [jnp.sum(self.normals[name] * params[name]) for name in NAMES]
        return jnp.sum(jnp.cosh(jnp.stack(products)))


class Method:
    """Steps of a problem, compiled once for each set of active layers, whatever the seed."""

    def __init__(self, problem, lmos, distribution):
        self.layers = dm.layers_by_path(random_tree(0), NAMES)
        self.sampler = dm.DepthSampler(self.layers, DISTRIBUTIONS[distribution], seed=0)
        subtrees = dm.chain_subtrees(lmos, {name: name for name in NAMES})
        tx = optax.chain(subtrees, optax.scale_by_learning_rate(1.0))

        @functools.partial(jax.jit, static_argnames="active")
        def step(params, active):
            mask = self.layers.subset(active)
            before, grads = dm.masked_value_and_grad(problem)(params, layer_mask=mask)
            updates, _ = tx.update(grads, tx.init(params), params, layer_mask=mask)
            new = optax.apply_updates(params, updates)
            full = jax.grad(problem)(params)
            duals = jnp.stack([NORMS[name].dual_norm(full[name]) for name in NAMES])
            return new, before, problem(new), duals

        self.step = step

    def run(self, params, seed, num_steps):
        """f before and after each step, the dual norms of the gradient, and the active layers."""
        history = []
        for k in range(num_steps):
            active = self.sampler.active(seed * num_steps + k)  # draws of their own for each seed
            params, before, after, duals = self.step(params, active)
            history.append((float(before), float(after), np.asarray(duals), np.asarray(active)))
        return history


def sharp_lmos(problem):
    return {
        name: dm.transforms.norm_sharp(NORMS[name], 1 / constant)
        for name, constant in problem.smoothness().items()
    }


ADAPTIVE = {
    name: dm.norm_lmo(
        norm, dm.schedules.adaptive_radius(HyperbolicCosines.l0, HyperbolicCosines.l1)
    )
    for name, norm in NORMS.items()
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_sharp_step_lowers_a_smooth_function_by_its_bound(name):
    with jax.enable_x64(True):
        problem = LeastSquares()
        constants = np.array(list(problem.smoothness().values()))
        method = Method(problem, sharp_lmos(problem), name)
        for seed in range(4):
            for before, after, duals, active in method.run(random_tree(seed), seed, 25):
                bound = np.sum(active * duals**2 / (2 * constants))
                assert bound > 0
                assert before - after >= bound * (1 - 1e-9)


def test_the_constants_are_not_larger_than_they_must_be():
    # A test with constants far too large could not fail: at 20 / L_i some step goes up.
    with jax.enable_x64(True):
        problem = LeastSquares()
        lmos = {
            name: dm.transforms.norm_sharp(NORMS[name], 20 / constant)
            for name, constant in problem.smoothness().items()
        }
        history = Method(problem, lmos, "full").run(random_tree(0), 0, 25)
        assert any(after > before for before, after, _, _ in history)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_adaptive_step_lowers_an_l0_l1_smooth_function_by_its_bound(name):
    with jax.enable_x64(True):
        problem = HyperbolicCosines()
        method = Method(problem, ADAPTIVE, name)
        for seed in range(4):
            start = jax.tree.map(lambda x: 3 * x, random_tree(seed))
            for before, after, duals, active in method.run(start, seed, 25):
                bound = np.sum(active * duals**2 / (2 * (problem.l0 + problem.l1 * duals)))
                assert before - after >= bound * (1 - 1e-9)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_averaged_bound_of_a_smooth_function_holds_over_many_seeds(name):
    # (1/K) Σ_k Σ_i (π_i / L_i) E a_i² ≤ 2Δ/K
    num_steps, num_seeds = 12, 60
    with jax.enable_x64(True):
        problem = LeastSquares()
        constants = np.array(list(problem.smoothness().values()))
        weights = INCLUSION[name] / constants
        start = random_tree(0)
        method = Method(problem, sharp_lmos(problem), name)
        means = []
        for seed in range(num_seeds):
            history = method.run(start, seed, num_steps)
            means.append(np.mean([np.sum(weights * duals**2) for _, _, duals, _ in history]))
        bound = 2 * (float(problem(start)) - problem.infimum) / num_steps
        assert np.mean(means) <= bound
        assert np.mean(means) > 0.05 * bound  # the bound says something here


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_an_l0_l1_smooth_function_is_stationary_after_the_steps_of_the_bound(name):
    # Σ_i E a_i ≤ ε at some step once K ≥ 2Δ Σ(L⁰_i / π_i) / ε² + 2Δ max(L¹_i / π_i) / ε
    num_steps, num_seeds = 40, 25
    with jax.enable_x64(True):
        problem = HyperbolicCosines()
        start = random_tree(0)
        method = Method(problem, ADAPTIVE, name)
        sums = [
            [np.sum(duals) for _, _, duals, _ in method.run(start, seed, num_steps)]
            for seed in range(num_seeds)
        ]
        gap = float(problem(start)) - problem.infimum
        quadratic = 2 * gap * np.sum(problem.l0 / INCLUSION[name])
        linear = 2 * gap * np.max(problem.l1 / INCLUSION[name])
        epsilon = (linear + math.sqrt(linear**2 + 4 * num_steps * quadratic)) / (2 * num_steps)
        assert np.min(np.mean(sums, axis=0)) <= epsilon
