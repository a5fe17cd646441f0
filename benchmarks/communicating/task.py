"""The text, cut into parts of workers, the GPT, and the optimizers by which they train it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dropmuon_jax as dm
from dropmuon_jax.compression import Compressor, Identity, Natural, RankK, TopK
from gpt import GPT
from study import Count, Settings
from text import even_windows, load_text

NUM_GROUPS = 3  # of layers, and so programs of each method that drops


class GPTSettings(Settings):
    """The network, and how much of the text a worker sees in a step."""

    width: Count = 64
    """Of the GPT."""
    num_blocks: Count = 4
    """Of the GPT."""
    num_heads: Count = 4
    """Of each block."""
    context: Count = 64
    """Characters that a block of text is long."""
    batch_size: Count = 8
    """Blocks of text of each worker in a step."""
    num_workers: Count = 4
    """Each draws from a part of the text of its own."""


class Method(NamedTuple):
    """How workers send what is new in their momenta."""

    title: str
    compressor: Compressor
    """Of matrices."""
    other: Compressor = Identity()
    """Of embeddings, biases and scales, which are most of what is left."""
    drops: bool = False
    server: Compressor | None = None


_NATURAL = Natural(8)
_LOW_RANK = RankK(0.15, _NATURAL)
METHODS = {
    "muon": Method("Muon", Identity()),
    "natural8": Method("natural, 8 bits", _NATURAL, _NATURAL),
    "top10_natural": Method("top 10 %, natural", TopK(0.1, _NATURAL), _NATURAL),
    "rank15": Method("rank 15 %", RankK(0.15)),
    "rank15_natural8": Method("rank 15 %, natural", _LOW_RANK, _NATURAL),
    "rank15_natural8_server": Method(
        "the same, server natural", _LOW_RANK, _NATURAL, server=_NATURAL
    ),
    "drop_muon": Method("Drop-Muon", Identity(), drops=True),
    "drop_natural8": Method("drop, natural, 8 bits", _NATURAL, _NATURAL, drops=True),
    "drop_rank15_natural8": Method("drop, rank 15 %, natural", _LOW_RANK, _NATURAL, drops=True),
}


class Task(NamedTuple):
    """What is learned, and from what."""

    params: Callable[[int], Any]
    """Initial parameters of a seed."""
    layers: dm.Layers
    loss: Callable[..., jax.Array]
    """Of parameters, the batch of one worker and the depth from which it is differentiated."""
    batches: Callable[[int, int], np.ndarray]
    """Of a seed and a step, (workers, blocks, characters)."""
    evaluate: Callable[[Any], dict[str, float]]
    """The loss on "validation" and "test"."""
    text: dict[str, Any]
    """What identifies the text."""


def make_task(settings: GPTSettings, num_eval_windows: int = 64) -> Task:
    """The task of these settings."""
    text, window = load_text(), settings.context + 1
    parts = np.array_split(text.train, settings.num_workers)
    windows = {
        name: even_windows(name, block, num_eval_windows, window)
        for name, block in (("validation", text.validation), ("test", text.test))
    }
    model = GPT(
        len(text.alphabet),
        settings.width,
        settings.num_heads,
        settings.num_blocks,
        settings.context,
    )
    tokens = jnp.zeros((1, settings.context), jnp.int32)
    init = jax.jit(lambda key: model.init(key, tokens)["params"])
    layers = dm.layers_by_path(init(jax.random.key(0)), model.layer_patterns()).group(NUM_GROUPS)

    def loss(params: Any, batch: jax.Array, depth: Any = 0) -> jax.Array:
        logits: Any = model.apply({"params": params}, batch[:, :-1], layers.stack_depth(depth))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def batches(seed: int, step: int) -> np.ndarray:
        starts = [
            np.random.default_rng((seed, step, worker)).integers(
                len(part) - window, size=settings.batch_size
            )
            for worker, part in enumerate(parts)
        ]
        return np.stack(
            [part[of[:, None] + np.arange(window)] for part, of in zip(parts, starts, strict=True)]
        )

    evaluated = jax.jit(loss)
    return Task(
        lambda seed: init(jax.random.key(seed)),
        layers,
        loss,
        batches,
        lambda params: {name: float(evaluated(params, of)) for name, of in windows.items()},
        text.record(),
    )


def make_optimizer(
    method: Method, task: Task, rate: Any, workers: Any, *, auxiliary_rate: float, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a method, for gradients of all workers."""
    optimizer = dm.compression.drop_ef21_muon(
        rate,
        task.layers,
        method.compressor,
        other=method.other,
        seed=seed,
        server_norm="frobenius",
        auxiliary_learning_rate=jnp.asarray(auxiliary_rate) * rate,
        server_compressor=method.server,
    )
    return dm.compression.on_workers(optimizer, workers)


def payload_bytes(method: Method, task: Task, depth: int) -> int:
    """What one worker sends in a step at a depth, matrices and all else."""
    params = jax.eval_shape(task.params, 0)
    labels = jax.tree.leaves(dm.matrix_labels(task.layers.row_shapes(params)))
    flags = jax.tree.leaves(task.layers.mask(depth))
    leaves, treedef = jax.tree.flatten(params)
    total = 0
    for label, compressor in (("matrix", method.compressor), ("other", method.other)):
        chosen = [x if of == label else None for x, of in zip(leaves, labels, strict=True)]
        mask = [flag if of == label else None for flag, of in zip(flags, labels, strict=True)]
        total += dm.compression.payload_bits(
            compressor, treedef.unflatten(chosen), treedef.unflatten(mask), layers=task.layers
        )
    return total // 8
