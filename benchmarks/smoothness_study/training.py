"""Runs of the CNN: measured ones, whose smoothness is tracked, and compared ones."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import jax
import numpy as np
import optax

import dropmuon_jax as dm
from images import Images
from models import CNN
from smoothness_study.settings import Settings

Gradients = Literal["exact", "minibatch"]
GRADIENTS: tuple[Gradients, ...] = ("exact", "minibatch")
SampleKind = Literal["exact", "minibatch", "same batch"]
Samples = dict[str, dm.planning.SmoothnessSamples]
Radii = dict[str, dm.schedules.AdaptiveRadius]


@dataclasses.dataclass(frozen=True)
class Result:
    """Where a run ended."""

    train_loss: float
    test_accuracy: float
    uphill: float | None
    """The share of steps that raised the training loss; with exact gradients only."""


class Study:
    """The network, the data on the device, and programs that are compiled once for all radii."""

    def __init__(self, settings: Settings, images: Images):
        self.settings = settings
        self.data = jax.device_put(images)
        self.num_train = len(images.train_labels)
        self.model = CNN(settings.channels)
        # The first convolution sees one channel, of grey images: it is not depthwise.
        self.roles = {"Conv_0/kernel": "hidden", "Dense_0/kernel": "head"}
        self.tracker = dm.chain_subtrees(
            {
                role: dm.planning.track_smoothness(norm)
                for role, norm in dm.optimizers.ROLE_NORMS.items()
            },
            dm.Roles(self.roles).labels,
        )
        self._init = jax.jit(self.model.init)
        self._track = jax.jit(self.tracker.update)
        self._loss_and_gradient = jax.jit(jax.value_and_grad(self._loss))
        self._step = jax.jit(self._step_function)
        self._evaluate = jax.jit(self._count)

    def measure(self, gradients: Gradients) -> dict[SampleKind, Samples]:
        """The samples of a run with a radius that falls to 0; of minibatches also the noiseless."""
        seed, num_steps = self.settings.fit_seed, self.settings.num_steps
        params, opt_state = self._start(seed)
        kinds: list[SampleKind] = ["exact"] if gradients == "exact" else ["minibatch", "same batch"]
        states = {kind: self.tracker.init(params) for kind in kinds}
        records: dict[SampleKind, dm.planning.SmoothnessRecord] = {
            k: dm.planning.SmoothnessRecord() for k in kinds
        }
        prev_params = None
        for step, rows in enumerate(self._batches(seed, gradients)):
            _, grads = self._loss_and_gradient(params, rows)
            for kind in kinds:
                extra_args = {}
                if kind == "same batch" and prev_params is not None:
                    _, extra_args["prev_params_grads"] = self._loss_and_gradient(prev_params, rows)
                _, states[kind] = self._track(grads, states[kind], params, **extra_args)
                records[kind].append(states[kind])
            radii = self.constant(self.settings.fit_radius * (1 - step / num_steps))
            prev_params = params
            params, opt_state = self._step(grads, opt_state, params, radii, self._decay(gradients))
        return {kind: record.samples() for kind, record in records.items()}

    def train(self, gradients: Gradients, seed: int, radii: Radii, multiplier: float) -> Result:
        """The end of a run in which every leaf has its radius times the multiplier."""
        # t / c for t = ‖M‖* / (L⁰ + L¹‖M‖*) are other constants, not another program.
        scaled = {
            path: dm.schedules.AdaptiveRadius(radius.l0 / multiplier, radius.l1 / multiplier)
            for path, radius in radii.items()
        }
        params, opt_state = self._start(seed)
        losses = []
        for rows in self._batches(seed, gradients):
            loss, grads = self._loss_and_gradient(params, rows)
            losses.append(loss)
            params, opt_state = self._step(grads, opt_state, params, scaled, self._decay(gradients))
        _, loss = self._evaluate(params, self.data.train_images, self.data.train_labels)
        correct, _ = self._evaluate(params, self.data.test_images, self.data.test_labels)
        descent = np.diff(np.array([*losses, loss], float))
        uphill = float(np.mean(~(descent <= 0))) if gradients == "exact" else None
        return Result(float(loss), float(correct), uphill)

    def constant(self, radius: float) -> Radii:
        """One radius for every leaf and gradient: L⁰ = 0 and L¹ = 1 / radius."""
        layers = dm.layers_by_path(self._abstract_params(), self.model.layer_patterns())
        return {
            f"/{path}": dm.schedules.AdaptiveRadius(0.0, 1 / radius)
            for path in (leaf.path for leaf in layers.leaves)
        }

    def _abstract_params(self) -> Any:
        return jax.eval_shape(self._init, jax.random.key(0), self.data.train_images[:1])["params"]

    def _optimizer(self, radii: Any, decay: Any) -> optax.GradientTransformationExtraArgs:
        return dm.gluon(
            1.0,
            dict.fromkeys(dm.layers.ROLES, radii),
            momentum=dm.momentum(decay),
            roles=self.roles,
        )

    def _start(self, seed: int) -> tuple[Any, Any]:
        params = self._init(jax.random.key(seed), self.data.train_images[:1])["params"]
        return params, self._optimizer(1.0, 0.0).init(params)

    def _batches(self, seed: int, gradients: Gradients) -> Iterable[np.ndarray]:
        """The rows of each step's batch; of exact gradients all."""
        generator = np.random.default_rng(seed)
        for _ in range(self.settings.num_steps):
            order = generator.permutation(self.num_train).astype(np.int32)
            yield order if gradients == "exact" else order[: self.settings.batch_size]

    def _decay(self, gradients: Gradients) -> float:
        return 0.0 if gradients == "exact" else self.settings.decay

    def _loss(self, params: Any, rows: jax.Array) -> jax.Array:
        logits: Any = self.model.apply({"params": params}, self.data.train_images[rows])
        labels = self.data.train_labels[rows]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def _step_function(
        self, grads: Any, opt_state: Any, params: Any, radii: Radii, decay: jax.Array
    ) -> tuple[Any, Any]:
        updates, opt_state = self._optimizer(radii, decay).update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def _count(self, params: Any, images: jax.Array, labels: jax.Array) -> Any:
        logits: Any = self.model.apply({"params": params}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (logits.argmax(-1) == labels).mean(), losses.mean()
