"""The networks that are trained, and their batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

import dropmuon_jax as dm
from gpt import GPT
from models import CNN

_BATCH_SIZE = 16  # for up to as many devices
_VOCABULARY, _LENGTH = 12, 8


class Network(NamedTuple):
    """A network and what it learns."""

    model: nn.Module
    patterns: list[Any]
    batch: Callable[[int], tuple[np.ndarray, np.ndarray]]
    """Of a step: inputs and labels, the same in every process."""

    def init(self, key: jax.Array) -> Any:
        """The parameters, in the widest floating-point numbers there are."""
        params = self.model.init(key, self.batch(0)[0])["params"]
        return jax.tree.map(lambda leaf: leaf.astype(float), params)

    def loss(self, params: Any, batch: Any, layers: dm.Layers, depth: Any) -> jax.Array:
        """The mean over the batch; of stacked layers the backward pass ends at the depth."""
        inputs, labels = batch
        of_stack = (layers.stack_depth(depth),) if layers.stacks else ()
        logits: Any = self.model.apply({"params": params}, inputs, *of_stack)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_network(name: str) -> Network:
    """The "cnn", of three layers, or the "gpt", of four with two stacked ones among them."""
    if name == "cnn":
        cnn = CNN((8, 16))
        return Network(cnn, cnn.layer_patterns(), _images)
    gpt = GPT(_VOCABULARY, width=8, num_heads=2, num_blocks=2, max_length=_LENGTH)
    return Network(gpt, gpt.layer_patterns(), _sequences)


def _images(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise, and in it a bright pixel that tells the class."""
    rng = np.random.default_rng(step)
    images = rng.normal(size=(_BATCH_SIZE, 8, 8, 1)).astype(np.float32)
    labels = rng.integers(0, 10, _BATCH_SIZE).astype(np.int32)
    images[np.arange(_BATCH_SIZE), labels // 2, labels % 2 * 4] += 5
    return images, labels


def _sequences(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that count up from a random one, and the next of each."""
    start = np.random.default_rng(step).integers(0, _VOCABULARY, (_BATCH_SIZE, 1))
    tokens = ((start + np.arange(_LENGTH + 1)) % _VOCABULARY).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]
