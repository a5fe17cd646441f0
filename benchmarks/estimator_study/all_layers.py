"""The error of each momentum over the steps, all layers being active."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import dropmuon_jax as dm
from estimator_study.problems import Logistic, Quadratic
from estimator_study.settings import Settings

Trajectory = Literal["common", "own"]
_DRIVER_DECAY = 0.9


@dataclasses.dataclass(frozen=True)
class Estimator:
    """A momentum, by its decay."""

    make: Callable[[Array], optax.GradientTransformationExtraArgs]
    two_gradients: bool = False


ESTIMATORS: dict[str, Estimator] = {
    "gradient": Estimator(lambda decay: dm.momentum(0 * decay)),
    "EMA": Estimator(dm.momentum),
    "MVR-1": Estimator(dm.mvr_momentum, two_gradients=True),
    "MVR-2, q 0.5": Estimator(
        lambda decay: dm.mvr_momentum(decay, variant=2, q=0.5), two_gradients=True
    ),
    "MVR-2, q 0.1": Estimator(
        lambda decay: dm.mvr_momentum(decay, variant=2, q=0.1), two_gradients=True
    ),
    "MVR-3, q 0.5": Estimator(
        lambda decay: dm.mvr_momentum(decay, variant=3, q=0.5), two_gradients=True
    ),
    "MVR-3, q 0.1": Estimator(
        lambda decay: dm.mvr_momentum(decay, variant=3, q=0.1), two_gradients=True
    ),
    "MARS": Estimator(dm.transforms.mars_momentum),
    "MARS, no limit": Estimator(lambda decay: dm.transforms.mars_momentum(decay, max_norm=None)),
}


@dataclasses.dataclass(frozen=True)
class Errors:
    """‖M - ∇f‖ of one momentum in every configuration."""

    of_steps: Float[np.ndarray, "radii decays seeds steps"]

    @property
    def mean_of_steps(self) -> Float[np.ndarray, "radii decays steps"]:
        """The mean over seeds."""
        return self.of_steps.mean(2)

    @property
    def steady(self) -> Float[np.ndarray, "radii decays"]:
        """The mean over seeds and the second half of the steps."""
        return self._of_seeds.mean(2)

    @property
    def standard_error(self) -> Float[np.ndarray, "radii decays"]:
        """Of `steady`, from the means of the seeds; 0 for one seed."""
        num_seeds = self._of_seeds.shape[2]
        if num_seeds == 1:
            return np.zeros(self._of_seeds.shape[:2])
        return self._of_seeds.std(2, ddof=1) / num_seeds**0.5

    @property
    def _of_seeds(self) -> Float[np.ndarray, "radii decays seeds"]:
        return self.of_steps[..., self.of_steps.shape[-1] // 2 :].mean(-1)


def measure(
    problem: Quadratic | Logistic,
    settings: Settings,
    trajectory: Trajectory,
    names: Mapping[str, Estimator],
) -> dict[str, Errors]:
    """The errors of some of the estimators.

    On the common trajectory all estimators see the same X and the same minibatches, and move
    nothing: the iterates are those of Muon with an average of decay 0.9 on minibatches of its own,
    which moves as training does. (Steps along the exact gradient would end in a cycle of two
    points, in the middle of which an average of gradients lies.) On its own trajectory a momentum
    moves the iterates itself, by steps of the same radius.
    """

    def run(key: Array, radius: Array, decay: Array) -> dict[str, Float[Array, " steps"]]:
        txs = {name: estimator.make(decay) for name, estimator in names.items()}
        driver = dm.momentum(_DRIVER_DECAY)
        lmo = dm.norm_lmo(dm.norms.spectral_norm(), radius)

        def step(carry: Any, key: Array) -> Any:
            params, driver_state, states = carry
            samples, driver_samples = jax.random.randint(
                key, (2, settings.batch_size), 0, problem.num_samples
            )
            gradient, full = jax.grad(problem.loss), problem.gradient(params)
            grads = gradient(params, samples)
            estimates, new_states = {}, {}
            for name, tx in txs.items():
                extra_args = {}
                if names[name].two_gradients:
                    prev_params = dm.prev_params(states[name], params)
                    extra_args["prev_params_grads"] = gradient(prev_params, samples)
                estimates[name], new_states[name] = tx.update(
                    grads, states[name], params, **extra_args
                )
            if trajectory == "common":
                driver_grads = gradient(params, driver_samples)
                direction, driver_state = driver.update(driver_grads, driver_state, params)
            else:
                (direction,) = estimates.values()
            updates, _ = lmo.update(direction, lmo.init(params), params)
            errors = {name: jnp.linalg.norm(m - full) for name, m in estimates.items()}
            return (params - updates, driver_state, new_states), errors

        params = problem.start
        states = {name: tx.init(params) for name, tx in txs.items()}
        keys = jax.random.split(key, settings.num_steps)
        return jax.lax.scan(step, (params, driver.init(params), states), keys)[1]

    of_decays = jax.vmap(run, (None, None, 0))
    of_seeds = jax.vmap(of_decays, (0, None, None), out_axes=1)
    of_radii = jax.vmap(of_seeds, (None, 0, None))
    keys = jax.random.split(jax.random.key(settings.seed), settings.num_seeds)
    errors = jax.jit(of_radii)(keys, jnp.asarray(settings.radii), jnp.asarray(settings.decays))
    return {name: Errors(np.asarray(errors[name])) for name in names}
