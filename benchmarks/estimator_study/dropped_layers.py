"""The error of the momentum of dropped layers, by where the second gradient is taken."""

import dataclasses
import itertools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import dropmuon_jax as dm
from estimator_study.problems import LayeredQuadratic
from estimator_study.settings import Settings

Point = Literal["own step", "last step", "all own steps"]
OnWaking = Literal["correct", "decay", "restart"]
POINTS: tuple[Point, ...] = get_args(Point)
ON_WAKING: tuple[OnWaking, ...] = get_args(OnWaking)
VARIANTS: tuple[Literal[1, 3], ...] = (1, 3)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a momentum does about layers that were inactive; without a variant it is the EMA.

    The second gradient is taken

    * "own step": at the active layers' parameters before their own last active step, and the
      inactive layers as they are now; this is `dm.masked_value_and_grad_pair`;
    * "last step": at the whole network as it was in the step before;
    * "all own steps": at every layer's parameters before its own last active step.
    """

    variant: Literal[1, 3] | None = None
    point: Point = "own step"
    on_waking: OnWaking = "correct"

    @property
    def name(self) -> str:
        """For tables."""
        return "EMA" if self.variant is None else f"{self.point}, {self.on_waking}"


EMA = Rule()
RULES: tuple[Rule, ...] = (
    EMA,
    *itertools.starmap(Rule, itertools.product(VARIANTS, POINTS, ON_WAKING)),
)


class Configuration(NamedTuple):
    """One of the grid."""

    radius: Any
    noise: Any
    coupling: Any
    decay: Any


class Measured(NamedTuple):
    """Means over the second half of the steps."""

    active: Any
    """‖M - ∇f‖ over all active layers together."""
    first_layer: Any
    """Of layer 0, which is active least often, in the steps in which it is."""
    head: Any
    """Of the last layer, which is always active."""
    value: Any
    """f."""


def grid(settings: Settings) -> list[Configuration]:
    """All configurations."""
    return list(
        itertools.starmap(
            Configuration,
            itertools.product(
                settings.layer_radii,
                settings.layer_noises,
                settings.couplings,
                settings.layer_decays,
            ),
        )
    )


def measure(
    problem: LayeredQuadratic, settings: Settings, rule: Rule
) -> dict[str, Float[np.ndarray, "seeds configurations"]]:
    """The fields of :class:`Measured` under a rule, which moves the iterates itself.

    A seed has the same samples and depths under all rules and in all configurations.
    """
    configurations = Configuration(
        *(jnp.asarray(column) for column in zip(*grid(settings), strict=True))
    )

    def of_seed(seed: Array) -> Measured:
        def run(configuration: Configuration) -> Measured:
            return _run(problem, rule, configuration, seed, settings.layer_steps)

        return jax.vmap(run)(configurations)

    # A vmap over configurations leaves the drawn depth a scalar, and lax.switch a switch: over
    # seeds it would compute every branch.
    seeds = settings.seed + jnp.arange(settings.layer_seeds)
    measured = jax.jit(lambda seeds: jax.lax.map(of_seed, seeds))(seeds)
    return {name: np.asarray(values) for name, values in measured._asdict().items()}


def previous_point(
    point: Point,
    state: dm.transforms.MVRMomentumState,
    params: dict[str, Array],
    layer_mask: dict[str, bool],
) -> dict[str, Array]:
    """Where the second gradient is taken."""
    own: Any = dm.prev_params(state, params)
    if point == "all own steps":
        return own
    if point == "own step":
        return jax.tree.map(
            lambda active, old, now: old if active else now, layer_mask, own, params
        )
    moved = state.prev_params.last_step == state.prev_params.count - 1
    return {
        name: jnp.where(moved[i], own[name], params[name]) for i, name in enumerate(sorted(params))
    }


def _run(
    problem: LayeredQuadratic, rule: Rule, configuration: Configuration, seed: Array, num_steps: int
) -> Measured:
    radius, noise, coupling, decay = configuration
    layers = dm.layers_by_path(problem.start, sorted(problem.start))
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=seed)
    momentum = (
        dm.momentum(decay)
        if rule.variant is None
        else dm.mvr_momentum(decay, variant=rule.variant, on_reactivate=rule.on_waking)
    )
    lmo = dm.norm_lmo(dm.norms.euclidean_norm(), radius)
    value_and_grad = dm.masked_value_and_grad(problem.loss)

    def train_step(params: Any, state: Any, full: Any, sample: Array, layer_mask: Any) -> Any:
        def gradient(at: Any) -> Any:
            return value_and_grad(at, sample, noise, coupling, layer_mask=layer_mask)[1]

        extra_args = {}
        if rule.variant is not None:
            at = previous_point(rule.point, state, params, layer_mask)
            extra_args["prev_params_grads"] = gradient(at)
        estimate, state = momentum.update(
            gradient(params), state, params, layer_mask=layer_mask, **extra_args
        )
        errors = jax.tree.map(
            lambda active, m, exact: jnp.sum((m - exact) ** 2) if active else jnp.zeros(()),
            layer_mask,
            estimate,
            full,
        )
        updates, _ = lmo.update(estimate, lmo.init(params), params, layer_mask=layer_mask)
        params = jax.tree.map(jnp.subtract, params, updates)
        return (params, state), jnp.stack(jax.tree.leaves(errors))

    step = dm.switch_depth(train_step, sampler)
    key = jax.random.key(seed)

    def body(carry: Any, count: Array) -> Any:
        depth = sampler.sample(count)
        sample = jax.random.randint(jax.random.fold_in(key, count), (), 0, problem.num_samples)
        full = problem.gradient(carry[0], coupling)
        carry, squares = step(depth, *carry, full, sample)
        return carry, (squares, depth == 0, problem.value(carry[0], coupling))

    start = (problem.start, momentum.init(problem.start))
    _, traced = jax.lax.scan(body, start, jnp.arange(num_steps))
    squares, whole, values = jax.tree.map(lambda of_steps: of_steps[num_steps // 2 :], traced)
    return Measured(
        active=jnp.sqrt(squares.sum(1)).mean(),
        first_layer=jnp.sqrt(squares[:, 0]).sum() / whole.sum(),
        head=jnp.sqrt(squares[:, -1]).mean(),
        value=values.mean(),
    )
