"""What is learned: images by a CNN, text by a GPT with stacked blocks."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dropmuon_jax as dm
from comparing.settings import CompareSettings
from gpt import GPT
from images import Images, load_images
from models import CNN
from text import even_windows, load_text

ROWS_AT_ONCE = 1000  # in an evaluation
MAX_TRAIN_EVALUATED = 2_000


class Task(NamedTuple):
    """A network and its data; what is measured is lower where it is better."""

    measure: str
    """"error", the part of images whose class is missed, or "loss", nats a character."""
    params: Callable[[int], Any]
    """Initial parameters of a seed."""
    layers: dm.Layers
    roles: dict[str, str]
    """What paths and shapes do not tell."""
    loss: Callable[..., jax.Array]
    """Of parameters, a batch and the depth from which it is differentiated."""
    data: tuple[jax.Array, ...]
    """All of the training data, on the device."""
    gather: Callable[[tuple[jax.Array, ...], jax.Array], Any]
    """The batch that is named by integers."""
    batches: Callable[[int], Iterator[np.ndarray]]
    """Without end, those integers of every step with a seed, the same for all methods."""
    evaluate: Callable[[Any], dict[str, float]]
    """The measure on "train", as far as it is looked at, "validation" and "test"."""


def make_task(settings: CompareSettings) -> Task:
    """The one that the arguments name."""
    return _text(settings) if settings.task == "text" else _images(settings)


def _images(settings: CompareSettings) -> Task:
    held_out, kept = settings.num_validation, settings.max_train
    images = load_images(
        settings.task,
        data_dir=settings.data_dir,
        download=settings.download,
        max_train=None if kept is None else kept + held_out,
    )
    num_train = len(images.train_labels) - held_out
    if settings.batch_size > num_train:
        raise SystemExit(
            f"--batch-size is {settings.batch_size}, and {max(num_train, 0)} training images are "
            f"left beside the {held_out} of --num-validation."
        )
    splits = _split(images, num_train)
    model = CNN(settings.channels)
    init = jax.jit(lambda key: model.init(key, splits["train"][0][:1])["params"])

    def logits(params: Any, images: jax.Array) -> Any:
        return model.apply({"params": params}, images)

    def loss(params: Any, batch: Any, depth: Any = 0) -> jax.Array:
        found = logits(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(found, batch[1]).mean()

    @jax.jit
    def misses(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return (logits(params, images).argmax(-1) != labels).sum()

    def error(params: Any, split: str) -> float:
        count = MAX_TRAIN_EVALUATED if split == "train" else None
        images, labels = (array[:count] for array in splits[split])
        chunks = range(0, len(labels), ROWS_AT_ONCE)
        found = [
            misses(params, images[i:][:ROWS_AT_ONCE], labels[i:][:ROWS_AT_ONCE]) for i in chunks
        ]
        return float(sum(found)) / len(labels)

    def batches(seed: int) -> Iterator[np.ndarray]:
        generator, size = np.random.default_rng(seed), settings.batch_size
        while True:  # epochs
            order = generator.permutation(num_train).astype(np.int32)
            yield from (order[i : i + size] for i in range(0, num_train - size + 1, size))

    return Task(
        "error",
        lambda seed: init(jax.random.key(seed)),
        dm.layers_by_path(init(jax.random.key(0)), model.layer_patterns()),
        model.roles(),
        loss,
        splits["train"],
        lambda data, rows: tuple(array[rows] for array in data),
        batches,
        lambda params: {split: error(params, split) for split in splits},
    )


def _split(images: Images, num_train: int) -> dict[str, tuple[jax.Array, jax.Array]]:
    order = np.random.default_rng(1).permutation(len(images.train_labels))
    train, held_out = order[:num_train], order[num_train:]
    splits = {
        "train": (images.train_images[train], images.train_labels[train]),
        "validation": (images.train_images[held_out], images.train_labels[held_out]),
        "test": (images.test_images, images.test_labels),
    }
    return {name: jax.device_put(arrays) for name, arrays in splits.items()}


def _text(settings: CompareSettings) -> Task:
    text, window = load_text(), settings.context + 1  # the last character is only predicted
    num_starts = len(text.train) - settings.context
    if num_starts < 1:
        raise SystemExit(
            f"--context is {settings.context}, and there are only {len(text.train)} characters."
        )
    blocks = {"train": text.train, "validation": text.validation, "test": text.test}
    windows = {
        name: jax.device_put(even_windows(name, block, settings.num_validation, window))
        for name, block in blocks.items()
    }
    model = GPT(
        len(text.alphabet),
        settings.width,
        settings.num_heads,
        settings.num_blocks,
        settings.context,
    )
    init = jax.jit(
        lambda key: model.init(key, jnp.zeros((1, settings.context), jnp.int32))["params"]
    )
    layers = dm.layers_by_path(init(jax.random.key(0)), model.layer_patterns())

    def loss(params: Any, batch: jax.Array, depth: Any = 0) -> jax.Array:
        logits: Any = model.apply({"params": params}, batch[:, :-1], layers.stack_depth(depth))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    evaluated = jax.jit(loss)

    def batches(seed: int) -> Iterator[np.ndarray]:
        generator = np.random.default_rng(seed)
        while True:
            yield generator.integers(num_starts, size=settings.batch_size).astype(np.int32)

    return Task(
        "loss",
        lambda seed: init(jax.random.key(seed)),
        layers,
        {},
        loss,
        (jax.device_put(text.train),),
        lambda data, starts: data[0][starts[:, None] + np.arange(window)],
        batches,
        lambda params: {name: float(evaluated(params, block)) for name, block in windows.items()},
    )
