"""One training step at one depth, written twice: with this package, and by hand without masks.

And the networks for which it is measured.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import numpy as np
import optax

import dropmuon_jax as dm
from methods import cross_entropy
from models import CNN, MLP, Transformer

# A schedule, as in real runs: what it multiplies, XLA cannot fold away.
LEARNING_RATE = optax.linear_schedule(0.02, 0.0, 1000)


ModelName = Literal["cnn", "mlp", "transformer"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)


@dataclasses.dataclass(frozen=True)
class DepthSettings:
    """Which networks are measured, and how often."""

    output_dir: Path
    """Folder for the numbers, as JSON, and the plot."""
    models: tuple[ModelName, ...] = MODELS
    """Networks to measure."""
    batch_size: int = 32
    """Images, or sequences of 64 tokens, a step."""
    channels: tuple[int, ...] = (16, 32, 64)
    """Output channels of each convolution of the CNN."""
    widths: tuple[int, ...] = (256, 256, 256)
    """Of each hidden layer of the MLP."""
    transformer_width: int = 64
    """Of the transformer's residual stream; a multiple of its 4 heads."""
    repetitions: int = 20
    """Timed runs of each program at each depth; 0 compares counts only."""


def check_settings(settings: DepthSettings) -> None:
    """Ends the program with a sentence for arguments that make no measurement."""
    for name in ("models", "channels", "widths"):
        if not getattr(settings, name):
            raise SystemExit(f"--{name} needs at least one value.")
    if settings.batch_size < 1:
        raise SystemExit(f"--batch-size must be at least 1, got {settings.batch_size}.")
    if settings.repetitions < 0:
        raise SystemExit(f"--repetitions must not be negative, got {settings.repetitions}.")
    if settings.transformer_width < 4 or settings.transformer_width % 4:
        raise SystemExit(
            f"--transformer-width must be a multiple of 4, got {settings.transformer_width}."
        )


class Subject(NamedTuple):
    """A network with one batch of random inputs and labels."""

    model: nn.Module
    patterns: list[str]
    batch: tuple[np.ndarray, np.ndarray]


class Step(NamedTuple):
    """A compiled step that overwrites its first two arguments, and all its arguments."""

    compiled: Any
    arguments: tuple[Any, ...]

    def flops(self) -> float:
        """By XLA's cost analysis."""
        return float(self.compiled.cost_analysis()["flops"])

    def bytes_accessed(self) -> float:
        """Read and written by the operations, by XLA's cost analysis."""
        return float(self.compiled.cost_analysis()["bytes accessed"])

    def temporary_bytes(self) -> int:
        """By XLA's memory analysis: without arguments and results."""
        return int(self.compiled.memory_analysis().temp_size_in_bytes)

    def run(self) -> "Step":
        """Takes the step and waits for it.

        Returns:
            The step to be taken next.
        """
        params, opt_state, _ = self.compiled(*self.arguments)
        jax.block_until_ready((params, opt_state))
        return self._replace(arguments=(params, opt_state, *self.arguments[2:]))


def make_subject(name: ModelName, settings: DepthSettings) -> Subject:
    """The "cnn" and the "mlp" on 28 × 28 images, the "transformer" on 64 tokens."""
    generator = np.random.default_rng(0)
    if name == "transformer":
        model = Transformer(width=settings.transformer_width)
        tokens = generator.integers(
            model.vocabulary, size=(settings.batch_size, 65), dtype=np.int32
        )
        return Subject(model, model.layer_patterns(), (tokens[:, :-1], tokens[:, 1:]))
    model = CNN(settings.channels) if name == "cnn" else MLP(settings.widths)
    images = generator.normal(size=(settings.batch_size, 28, 28, 1)).astype(np.float32)
    labels = generator.integers(10, size=settings.batch_size, dtype=np.int32)
    return Subject(model, model.layer_patterns(), (images, labels))


def init_params(subject: Subject) -> Any:
    """The parameters, the same at every call."""
    return subject.model.init(jax.random.key(0), subject.batch[0][:1])["params"]


def step_of_package(subject: Subject, depth: int) -> Step:
    """The step that a user of this package writes."""
    params = init_params(subject)
    layers = dm.layers_by_path(params, subject.patterns)
    tx = dm.drop_muon(LEARNING_RATE, layers, dm.uniform_depth(), seed=0)
    mask = layers.mask(depth)

    def loss_fn(params, batch):
        return cross_entropy(subject.model, params, batch)

    def step(params, opt_state, batch):
        loss, grads = dm.masked_value_and_grad(loss_fn)(params, batch, layer_mask=mask)
        updates, opt_state = tx.update(grads, opt_state, params, layer_mask=mask)
        return optax.apply_updates(params, updates), opt_state, loss

    return _compile(step, params, tx.init(params), subject.batch)


def step_by_hand(subject: Subject, depth: int) -> Step:
    """The step of a network in which only the layers from this depth on are trainable.

    The others are constants that JAX is never asked to differentiate, and that the optimizer has
    never seen. It shares the formulas of momentum and of the polar factor with the package, and
    neither its layers, its masks, its sampler nor its gradients.
    """
    params = init_params(subject)
    trainable = {name: params[name] for name in subject.patterns[depth:]}
    frozen = {name: params[name] for name in subject.patterns[:depth]}
    learning_rate = optax.scale_by_learning_rate(LEARNING_RATE)
    tx = optax.partition(
        {
            "matrix": optax.chain(
                dm.momentum(0.9), dm.newton_schulz_lmo(shape_factor="muon"), learning_rate
            ),
            "other": optax.chain(optax.scale_by_adam(), learning_rate),
        },
        _labels_by_hand,
    )

    def step(trainable, opt_state, frozen, batch):
        def loss_fn(trainable):
            return cross_entropy(subject.model, {**frozen, **trainable}, batch)

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    return _compile(step, trainable, tx.init(trainable), frozen, subject.batch)


def _labels_by_hand(trainable: Any) -> Any:
    """Muon for matrices and convolutions, Adam for vectors and embeddings."""

    def label(path: Any, leaf: jax.Array) -> str:
        return "other" if leaf.ndim < 2 or path[0].key == "embedding" else "matrix"

    return jax.tree.map_with_path(label, trainable)


def _compile(step: Callable[..., Any], *arguments: Any) -> Step:
    owned = jax.tree.map(jax.numpy.array, arguments)  # buffers of its own, to overwrite
    return Step(jax.jit(step, donate_argnums=(0, 1)).lower(*owned).compile(), owned)
