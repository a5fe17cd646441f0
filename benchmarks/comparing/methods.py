"""The contestants: an optimizer, the depths of its steps, and what a step spends."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm
from comparing.settings import CompareSettings, MethodName
from comparing.tasks import Task

RADII = dm.optimizers.SCION_CNN_RADII  # the relative steps of hidden layers, head and biases
TITLES: dict[str, str] = {
    "muon": "Muon",
    "drop_muon_uniform": "Drop-Muon, uniform",
    "drop_muon_epoch_shift": "Drop-Muon, epoch-shift",
    "drop_muon_time_aware": "Drop-Muon, time-aware",
    "optax_muon": "optax.contrib.muon",
    "adamw": "AdamW",
    "scion": "Scion, unconstrained",
    "scion_constrained": "Scion",
    "gluon": "Gluon",
    "drop_scion": "Drop-Scion, unconstrained",
    "drop_gluon": "Drop-Gluon",
    "muon_mvr1": "Muon, MVR-1",
    "muon_mvr2": "Muon, MVR-2",
    "muon_mvr3": "Muon, MVR-3",
    "muon_mars": "Muon, MARS",
    "drop_muon_mvr1": "Drop-Muon, MVR-1",
}
RATE_FACTORS: dict[str, float] = {
    "adamw": 0.2,
    "scion": 0.4,
    "scion_constrained": 0.2,
    "gluon": 0.6,
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A contestant of a task."""

    name: MethodName
    task: Task
    settings: CompareSettings

    @property
    def drops_layers(self) -> bool:
        """Whether some steps leave layers out."""
        return self.name.startswith("drop_")

    @property
    def follows_the_run(self) -> bool:
        """Whether its depths are planned along the run."""
        return self.name == "drop_muon_time_aware"

    @property
    def gradients_per_step(self) -> int:
        """Points at which a step takes the gradient of its batch."""
        return 2 if "mvr" in self.name else 1

    @property
    def kind(self) -> str:
        """The steps of methods of one kind are the same programs."""
        return "drop_muon" if self.name in _FIXED_DEPTHS else self.name

    @property
    def rate_factor(self) -> float:
        """Its learning rate, where that of Muon is 1."""
        return RATE_FACTORS.get(self.name.removeprefix("drop_"), 1.0)

    @property
    def has_own_schedule(self) -> bool:
        """Gluon's is that of its theory; all other learning rates fall linearly to 0."""
        return "gluon" in self.name

    @property
    def num_depths(self) -> int:
        """How many different steps there are."""
        return self.task.layers.num_layers if self.drops_layers else 1

    def sampler(self, seed: Any, num_steps: int, costs: Sequence[float]) -> dm.DepthSampler:
        """Of the depths of a run of so many steps, whose costs by depth are known."""
        layers = self.task.layers
        if not self.drops_layers:
            distribution = dm.full_depth()
        elif self.name == "drop_muon_epoch_shift":
            distribution = dm.epoch_shift_depth(num_steps, alpha=self.settings.alpha)
        elif self.name == "drop_muon_time_aware":
            distribution = dm.time_aware_depth(costs)
        else:
            distribution = dm.uniform_depth()
        return dm.DepthSampler(layers, distribution, seed=seed)

    def initial(self, seed: int) -> Any:
        """Parameters to start with: the same for all, but for Scion inside its ball."""
        params = self.task.params(seed)
        if self.name != "scion_constrained":
            return params
        key, roles = jax.random.key(seed), self.task.roles
        return dm.optimizers.scion_init(key, params, radii=RADII, roles=roles)

    def optimizer(
        self, rate: Any, auxiliary_rate: Any, sampler: dm.DepthSampler
    ) -> optax.GradientTransformationExtraArgs:
        """With constant learning rates, which may be traced: the programs are the same for all."""
        layers, roles, decay = self.task.layers, self.task.roles, self.settings.decay

        def muon(momentum: Any = decay) -> optax.GradientTransformationExtraArgs:
            options: dict[str, Any] = {
                "momentum": momentum,
                "auxiliary_learning_rate": auxiliary_rate,
            }
            if layers.stacks or self.drops_layers:  # Muon itself does not know what is stacked
                return dm.drop_muon(rate, layers, **options)
            return dm.muon(rate, **options)

        match self.name:
            case "optax_muon":
                tx = optax.contrib.muon(
                    rate,
                    beta=decay,
                    nesterov=False,
                    adam_learning_rate=auxiliary_rate,
                    muon_weight_dimension_numbers=self._dimension_numbers,
                )
            case "adamw":
                tx = optax.adamw(rate)
            case "scion":
                tx = dm.scion(rate, RADII, constrained=False, momentum=decay, roles=roles)
            case "scion_constrained":
                tx = dm.scion(rate, RADII, momentum=decay, roles=roles)
            case "gluon":
                tx = dm.gluon(dm.schedules.gluon_radius(rate), RADII, roles=roles)
            case "drop_scion":
                tx = dm.drop_scion(
                    rate, layers, RADII, constrained=False, momentum=decay, roles=roles
                )
            case "drop_gluon":
                tx = dm.drop_gluon(dm.schedules.gluon_radius(rate), layers, RADII, roles=roles)
            case "muon_mvr1" | "drop_muon_mvr1":
                tx = muon(dm.mvr_momentum(decay, variant=1))
            case "muon_mvr2":
                tx = muon(dm.mvr_momentum(decay, variant=2, q=self.settings.q))
            case "muon_mvr3":
                tx = muon(dm.mvr_momentum(decay, variant=3, q=self.settings.q))
            case "muon_mars":
                tx = muon(dm.transforms.mars_momentum(decay=0.95))  # γ and norm as published too
            case "drop_muon_time_aware":
                tx = dm.record_gains(muon(), sampler)
            case _:
                tx = muon()
        return optax.with_extra_args_support(tx)

    def step(self, depth: int | None, costs: Sequence[float]) -> Callable[..., Any]:
        """A training step, to be compiled; a depth of None is an argument of the step.

        Returns:
            A function of parameters, state, data, the integers of a batch, both learning rates, the
            seed and the depth, which returns parameters and state.
        """
        task, static_depth = self.task, depth

        def step(params, opt_state, data, rows, rate, auxiliary_rate, seed, depth):
            sampler = self.sampler(seed, 1, costs)
            depth = depth if static_depth is None else static_depth
            batch = task.gather(data, rows)
            mask = task.layers.mask(depth)
            extra: dict[str, Any] = {"layer_mask": mask} if self._takes_mask else {}
            if self.gradients_per_step == 2:
                prev_params = dm.prev_params(opt_state, params)
                gradients = dm.masked_value_and_grad_pair(task.loss)
                _, (grads, extra["prev_params_grads"]) = gradients(
                    params, prev_params, batch, depth, layer_mask=mask
                )
            else:
                gradient = dm.masked_value_and_grad(task.loss)
                _, grads = gradient(params, batch, depth, layer_mask=mask)
            tx = self.optimizer(rate, auxiliary_rate, sampler)
            updates, opt_state = tx.update(grads, opt_state, params, **extra)
            return optax.apply_updates(params, updates), opt_state

        return step

    @property
    def _takes_mask(self) -> bool:
        return self.drops_layers or (bool(self.task.layers.stacks) and self.name.startswith("muon"))

    def _dimension_numbers(self, params: optax.Params) -> Any:
        """For optax.contrib.muon: the matrices of Muon, (…, in, out), stacked where layers are."""

        def of_leaf(leaf: Any, label: str) -> MuonDimensionNumbers | None:
            if label != "matrix":
                return None
            first = leaf.ndim - 2 if self.task.layers.stacks else 0
            return MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)

        return jax.tree.map(of_leaf, params, dm.matrix_labels(params))


_FIXED_DEPTHS = ("drop_muon_uniform", "drop_muon_epoch_shift")
