"""Seconds to compress and to decompress, against the gradient of a block of GPT-2 small.

python benchmarks/compression_time.py --output-dir results

Of the six matrices of one block, of which GPT-2 small has twelve: a worker compresses once, and
decompresses its own payload and those of all workers. The turns of all compressors and of the
gradient alternate, and the smallest of each counts.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt

from drawing import finish, new_table
from dropmuon_jax.compression import (
    ColumnTopK,
    Compressor,
    Natural,
    RankK,
    ScaledSign,
    TopK,
)
from gpt import Block
from study import Count, Record, Settings, Study, Work

COMPRESSORS: dict[str, Compressor] = {
    "natural": Natural(),
    "natural, 8 bits": Natural(8),
    "scaled sign": ScaledSign(),
    "top 10 %": TopK(0.1),
    "top 10 % of columns": ColumnTopK(0.1),
    "rank 15 %": RankK(0.15),
    "rank 15 %, warm": RankK(0.15, method="warm"),
    "rank 15 %, natural": RankK(0.15, Natural(8)),
}


class CompressionTimeSettings(Settings):
    """The arguments of the study."""

    width: Count = 768
    """Of the block."""
    num_heads: Count = 12
    """Of the block."""
    context: Count = 1024
    """Length of a sequence."""
    sequences: Count = 4
    """Of a worker in a step."""
    num_workers: Count = 4
    """Whose payloads are decompressed, beside one's own."""
    turns: Count = 5
    """Of each."""


def run(settings: CompressionTimeSettings, work: Work) -> Record:
    """Times all in turns."""
    width = settings.width
    block = Block(settings.num_heads)
    x = jnp.zeros((settings.sequences, settings.context, width)) + jnp.arange(width) / width
    params = jax.jit(lambda key: block.init(key, x[:1, :2])["params"])(jax.random.key(0))

    def loss(params: Any, x: Any) -> jax.Array:
        out: Any = block.apply({"params": params}, x)
        return jnp.mean(out**2)

    # Also for the input, as every block but the first needs it.
    timed: dict[str, Any] = {"gradient": (jax.jit(jax.grad(loss, argnums=(0, 1))), (params, x))}
    rng = np.random.default_rng(0)
    shapes = {name: p.shape for name, p in _matrices(params).items()}
    news = {name: jnp.asarray(rng.normal(size=of), jnp.float32) for name, of in shapes.items()}
    costs = {}
    for name, of in COMPRESSORS.items():
        memory = {leaf: of.init(shape, jnp.float32) for leaf, shape in shapes.items()}

        def compress(news: Any, key: Any, memory: Any, of: Compressor = of) -> Any:
            return {leaf: of.compress(x, key, memory[leaf]) for leaf, x in news.items()}

        def decompress(payloads: Any, news: Any, of: Compressor = of) -> Any:
            def add(total: Any, sent: Any) -> Any:
                arrived = {leaf: of.decompress(sent[leaf], x) for leaf, x in news.items()}
                return jax.tree.map(jnp.add, total, arrived), None

            return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, news), payloads)[0]

        key = jax.random.key(0)
        payload = jax.jit(compress)(news, key, memory)
        # Each a buffer of its own: of one that is the same in every turn, XLA decompresses one.
        payloads = jax.tree.map(lambda x: jnp.stack([x] * (settings.num_workers + 1)), payload)
        timed[f"{name}: compress"] = jax.jit(compress), (news, key, memory)
        timed[f"{name}: decompress"] = jax.jit(decompress), (payloads, news)
        sizes = sum(of.bits(shape) for shape in shapes.values())
        costs[name] = sizes / 32 / sum(map(np.prod, shapes.values()))
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in work.track(range(settings.turns + 1), "timing"):  # the first compiles
        for name, (function, arguments) in timed.items():
            begin = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    least = {name: min(of) for name, of in seconds.items()}
    return {"seconds": least, "turns": seconds, "costs": costs}


def _matrices(params: Any) -> dict[str, Any]:
    """The matrices of a block, by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if leaf.ndim == 2}


def tables(record: Record) -> Any:
    """Shares of the gradient."""
    of, seconds = record["settings"], record["seconds"]
    tokens = of["sequences"] * of["context"]
    table = new_table(
        f"A block of width {of['width']}: its gradient for {tokens:,} tokens of a worker takes "
        f"{seconds['gradient']:.2f} s",
        *("compressor", "sent", "compress", "decompress", "share of gradient"),
    )
    for name, cost in record["costs"].items():
        first, second = (seconds[f"{name}: {what}"] for what in ("compress", "decompress"))
        share = (first + second) / seconds["gradient"]
        table.add_row(
            name, f"{cost:.3f}", f"{first:.3f} s", f"{second:.3f} s", f"{100 * share:.1f} %"
        )
    return [table]


def figures(record: Record) -> Any:
    """The shares, as bars."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    seconds = record["seconds"]
    names = list(record["costs"])
    left = np.zeros(len(names))
    for what, colour in (("compress", "#0072B2"), ("decompress", "#E69F00")):
        width = np.array([100 * seconds[f"{n}: {what}"] / seconds["gradient"] for n in names])
        axes.barh(names, width, left=left, color=colour, label=what)
        left += width
    axes.axvline(15, color="#999999", linestyle="--")
    axes.invert_yaxis()
    axes.legend(frameon=False)
    finish(axes, x="% of the block's gradient")
    return {"": figure}


STUDY = Study("compression_time", CompressionTimeSettings, run, tables, figures)

if __name__ == "__main__":
    STUDY.main()
