"""One training step at one depth, written twice: with this package, and by hand without masks.

And the networks for which it is measured.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from unittest import mock

import flax.linen as nn
import jax
import numpy as np
import optax

import dropmuon_jax as dm
from by_hand import logits_by_hand, muon_by_hand
from gpt import GPT
from methods import cross_entropy
from models import CNN, MLP, Transformer

# A schedule, as in real runs: what it multiplies, XLA cannot fold away.
LEARNING_RATE = optax.linear_schedule(0.02, 0.0, 1000)


ModelName = Literal["cnn", "mlp", "transformer", "gpt"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)
UNSTACKED: tuple[ModelName, ...] = tuple(name for name in MODELS if name != "gpt")


@dataclasses.dataclass(frozen=True)
class DepthSettings:
    """Which networks are measured, and how often."""

    output_dir: Path
    """Folder for the numbers, as JSON, and the plot."""
    models: tuple[ModelName, ...] = UNSTACKED
    """Networks to measure."""
    batch_size: int = 32
    """Images, or sequences of 64 tokens, a step."""
    channels: tuple[int, ...] = (16, 32, 64)
    """Output channels of each convolution of the CNN."""
    widths: tuple[int, ...] = (256, 256, 256)
    """Of each hidden layer of the MLP."""
    transformer_width: int = 64
    """Of the transformer's residual stream; a multiple of its 4 heads."""
    gpt_width: int = 64
    """Likewise, of the transformer whose blocks are stacked."""
    gpt_blocks: int = 3
    """How many are."""
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
    for name in ("transformer_width", "gpt_width"):
        width = getattr(settings, name)
        if width < 4 or width % 4:
            raise SystemExit(f"--{name.replace('_', '-')} must be a multiple of 4, got {width}.")
    if settings.gpt_blocks < 1:
        raise SystemExit(f"--gpt-blocks must be at least 1, got {settings.gpt_blocks}.")


class Subject(NamedTuple):
    """A network with one batch of random inputs and labels."""

    model: nn.Module
    patterns: list[Any]
    batch: tuple[np.ndarray, np.ndarray]

    def layers(self) -> dm.Layers:
        """Shallow to deep."""
        return dm.layers_by_path(jax.eval_shape(lambda: init_params(self)), self.patterns)

    def loss(self, params: Any, batch: Any, depth: int) -> jax.Array:
        """Of params and batch; in a stack differentiated with respect to the active rows only."""
        if not isinstance(self.model, GPT):
            return cross_entropy(self.model, params, batch)
        inputs, labels = batch
        stack_depth = self.layers().stack_depth(depth)
        logits: Any = self.model.apply({"params": params}, inputs, stack_depth)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Step(NamedTuple):
    """A compiled step that overwrites its first two arguments, and all its arguments."""

    compiled: Any
    arguments: tuple[Any, ...]
    unrolled: Any
    """The same without loops, whose bodies XLA's cost analysis counts once, not at each turn."""

    def flops(self) -> float:
        """By XLA's cost analysis."""
        return float(self.unrolled.cost_analysis()["flops"])

    def bytes_accessed(self) -> float:
        """Read and written by the operations, by XLA's cost analysis."""
        return float(self.unrolled.cost_analysis()["bytes accessed"])

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
    """The "cnn" and the "mlp" on 28 × 28 images, the "transformer" and the "gpt" on 64 tokens."""
    generator = np.random.default_rng(0)
    if name in ("transformer", "gpt"):
        model = Transformer(width=settings.transformer_width)
        if name == "gpt":
            model = GPT(
                model.vocabulary, settings.gpt_width, model.num_heads, settings.gpt_blocks, 64
            )
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
    return jax.jit(subject.model.init)(jax.random.key(0), subject.batch[0][:1])["params"]


def step_of_package(subject: Subject, depth: int) -> Step:
    """The step that a user of this package writes."""
    params, layers = init_params(subject), subject.layers()
    tx = dm.drop_muon(LEARNING_RATE, layers)
    mask = layers.mask(depth)

    def loss_fn(params, batch):
        return subject.loss(params, batch, depth)

    def step(params, opt_state, batch):
        loss, grads = dm.masked_value_and_grad(loss_fn)(params, batch, layer_mask=mask)
        updates, opt_state = tx.update(grads, opt_state, params, layer_mask=mask)
        return optax.apply_updates(params, updates), opt_state, loss

    has_loops = bool(layers.stacks)
    return _compile(step, params, tx.init(params), subject.batch, has_loops=has_loops)


def step_by_hand(subject: Subject, depth: int) -> Step:
    """The step of a network in which only the layers from this depth on are trainable.

    The others are constants that JAX is never asked to differentiate, and that the optimizer has
    never seen. It shares the formulas of momentum and of the polar factor with the package, and
    neither its layers, its masks, its sampler nor its gradients. Of a stack it has only the
    trainable rows, where the package has gradients and updates of all, zero for the others: more
    memory and traffic, by as much as the parameters weigh beside the activations.
    """
    trainable, frozen = _part_by_hand(subject, depth)

    def step(trainable, opt_state, frozen, batch):
        def loss_fn(trainable):
            if not isinstance(subject.model, GPT):
                return cross_entropy(subject.model, {**frozen, **trainable}, batch)
            inputs, labels = batch
            blocks = [tree["blocks"] for tree in (frozen, trainable) if "blocks" in tree]
            logits = logits_by_hand(subject.model, {**frozen, **trainable}, blocks, inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    tx = muon_by_hand(LEARNING_RATE)
    arguments = trainable, tx.init(trainable), frozen, subject.batch
    return _compile(step, *arguments, has_loops=isinstance(subject.model, GPT))


def _part_by_hand(subject: Subject, depth: int) -> tuple[Any, Any]:
    """The parameters of the layers from a depth on, and of those before it."""
    params = init_params(subject)
    if not isinstance(subject.model, GPT):
        trainable = {name: params[name] for name in subject.patterns[depth:]}
        return trainable, {name: params[name] for name in subject.patterns[:depth]}
    trainable = {name: params[name] for name in ("final_norm", "head")}
    frozen = {name: params[name] for name in ("tokens", "positions")}
    if depth == 0:
        trainable, frozen = trainable | frozen, {}
    first = max(depth - 1, 0)  # row that is trainable
    if first < subject.model.num_blocks:
        trainable["blocks"] = jax.tree.map(lambda leaf: leaf[first:], params["blocks"])
    if first > 0:
        frozen["blocks"] = jax.tree.map(lambda leaf: leaf[:first], params["blocks"])
    return trainable, frozen


def _compile(step: Callable[..., Any], *arguments: Any, has_loops: bool) -> Step:
    owned = jax.tree.map(jax.numpy.array, arguments)  # buffers of its own, to overwrite
    compiled = unrolled = jax.jit(step, donate_argnums=(0, 1)).lower(*owned).compile()
    if has_loops:
        scan, fori_loop = (
            functools.partial(loop, unroll=True) for loop in (jax.lax.scan, jax.lax.fori_loop)
        )
        with mock.patch.multiple(jax.lax, scan=scan, fori_loop=fori_loop):
            again = jax.jit(lambda *args: step(*args), donate_argnums=(0, 1))  # traced anew
            unrolled = again.lower(*owned).compile()
    return Step(compiled, owned, unrolled)
