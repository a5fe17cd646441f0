"""The GPT and its optimizer without this package's layers, masks and gradients.

It shares with the package the formulas of momentum and of the polar factor.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import optax

import dropmuon_jax as dm
from gpt import GPT, Block


def logits_by_hand(model: GPT, params: Any, blocks: Sequence[Any], tokens: jax.Array) -> jax.Array:
    """What `model.apply` returns, by `lax.scan` and `jax.checkpoint`.

    Args:
        model: The GPT; without a policy each block is rematerialized, with one none is.
        params: All but the blocks.
        blocks: Consecutive rows of the stack, shallow to deep, with a scan for each element.
        tokens: (batch, length).
    """
    block = Block(model.num_heads)

    def run(x: Any, row: Any) -> tuple[Any, None]:
        return block.apply({"params": row}, x), None

    if model.policy is None:
        run = jax.checkpoint(run, prevent_cse=False)
    table = params["tokens"]["embedding"]
    x: Any = table[tokens] + params["positions"]["embedding"][: tokens.shape[1]]
    for rows in blocks:
        x, _ = jax.lax.scan(run, x, rows)
    x = nn.LayerNorm().apply({"params": params["final_norm"]}, x)
    if model.tied:
        return x @ table.T
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def muon_by_hand(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon, all matrices of a stack at once, and Adam for vectors and embeddings."""
    rate = optax.scale_by_learning_rate(learning_rate)
    lmo = dm.newton_schulz_lmo(shape_factor="muon")
    return optax.partition(
        {
            "matrix": optax.chain(dm.momentum(0.9), lmo, rate),
            "stack": optax.chain(dm.momentum(0.9), _over_rows(lmo), rate),
            "other": optax.chain(optax.scale_by_adam(), rate),
        },
        _labels,
    )


def _over_rows(lmo: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation without a state, of stacked matrices."""

    def of_row(row: optax.Updates) -> optax.Updates:
        updates, _ = lmo.update(row, lmo.init(row))
        return updates

    return optax.stateless(
        lambda updates, params: jax.vmap(of_row)(updates) if jax.tree.leaves(updates) else updates
    )


def _labels(params: Any) -> Any:
    def label(path: Any, leaf: jax.Array) -> str:
        stacked = path[0].key == "blocks"
        if leaf.ndim < 2 + stacked or path[-1].key == "embedding":
            return "other"
        return "stack" if stacked else "matrix"

    return jax.tree.map_with_path(label, params)
