"""Networks with a batch, and their training step at a depth by means of the package."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dropmuon_jax as dm
from counting.programs import Program
from counting.settings import Counts, NetworkName
from gpt import GPT
from images import NUM_CLASSES
from models import CNN, MLP, Transformer

# A schedule, as in real runs: what it multiplies, XLA cannot fold away.
LEARNING_RATE = optax.linear_schedule(0.02, 0.0, 10_000)
VOCABULARY, NUM_HEADS, CONTEXT = 128, 4, 64


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A network with one batch of random inputs and labels, and Drop-Muon."""

    model: Any
    batch: tuple[jax.Array, jax.Array]
    params: Any
    layers: dm.Layers
    tx: optax.GradientTransformationExtraArgs

    def loss(self, params: Any, batch: Any, depth: Any = 0) -> jax.Array:
        """Of a stack it is differentiated with respect to the active rows only."""
        depths = (self.layers.stack_depth(depth),) if isinstance(self.model, GPT) else ()
        logits: Any = self.model.apply({"params": params}, batch[0], *depths)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def step(self, params: Any, opt_state: Any, batch: Any, depth: Any) -> tuple[Any, Any, Any]:
        """A training step of one's own, of the package's parts."""
        loss_fn = functools.partial(self.loss, depth=depth)
        mask = self.layers.mask(depth)
        loss, grads = dm.masked_value_and_grad(loss_fn)(params, batch, layer_mask=mask)
        updates, opt_state = self.tx.update(grads, opt_state, params, layer_mask=mask)
        return optax.apply_updates(params, updates), opt_state, loss

    def kept(self) -> list[Any]:
        """Parameters and a state that a step may overwrite."""
        params = jax.tree.map(jnp.copy, self.params)
        return [params, self.tx.init(params)]

    def steps(self, depth: int, head: dict[str, Any]) -> list[Program]:
        """The step at a static depth: by the one call, and by the parts.

        Where blocks are stacked, one program of the call serves every depth: that is what is timed,
        and counted is the one in which the depth is static.
        """
        one_depth = dm.fixed_depth(np.eye(self.layers.num_layers)[depth].tolist())
        sampler = dm.DepthSampler(self.layers, one_depth, seed=0)
        step_fn = dm.train_step(self.loss, self.tx, sampler)
        count, trace = itertools.count(), functools.partial(step_fn.trace_depth, depth)
        call = lambda *inputs: step_fn(next(count), *inputs)  # noqa: E731 - one step after another
        parts = jax.jit(self.step, donate_argnums=(0, 1), static_argnames="depth")
        return [
            Program(head | {"program": "train_step"}, call, self.kept(), self.batch, trace=trace),
            Program(head | {"program": "parts"}, parts, self.kept(), self.batch, depth),
        ]


def make_problem(name: NetworkName, settings: Counts) -> Problem:
    """The "cnn" and the "mlp" on 28 × 28 images, the "transformer" and the "gpt" on tokens."""
    batch_size = settings.batch_size
    if name == "gpt":
        return make_gpt(settings.width, settings.blocks, CONTEXT, batch_size)
    if name == "transformer":
        model = Transformer(VOCABULARY, settings.width, NUM_HEADS)
        return _problem_of_tokens(model, CONTEXT, batch_size)
    model = CNN(settings.channels) if name == "cnn" else MLP(settings.widths)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch_size, 28, 28, 1)).astype(np.float32)
    return _problem(model, images, rng.integers(NUM_CLASSES, size=batch_size, dtype=np.int32))


def make_gpt(width: int, num_blocks: int, context: int, batch_size: int) -> Problem:
    """A GPT with stacked blocks."""
    model = GPT(VOCABULARY, width, NUM_HEADS, num_blocks, context)
    return _problem_of_tokens(model, context, batch_size)


def _problem_of_tokens(model: Any, context: int, batch_size: int) -> Problem:
    shape = batch_size, context + 1
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=shape, dtype=np.int32)
    return _problem(model, tokens[:, :-1], tokens[:, 1:])


def _problem(model: Any, *batch: np.ndarray) -> Problem:
    inputs, labels = map(jnp.asarray, batch)
    params = jax.jit(model.init)(jax.random.key(0), inputs[:1])["params"]
    layers = dm.layers_by_path(params, model.layer_patterns())
    return Problem(model, (inputs, labels), params, layers, dm.drop_muon(LEARNING_RATE, layers))
