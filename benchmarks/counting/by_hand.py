"""Networks and Muon without this package's layers, masks, samplers and gradients.

They share with it the formulas of momentum and of the polar factor.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import dropmuon_jax as dm
from counting.problems import LEARNING_RATE, Problem
from counting.programs import Program
from gpt import GPT, Block


def step_by_hand(problem: Problem, depth: int, head: dict[str, Any]) -> Program:
    """The step of a network in which only the layers from this depth on are trainable.

    The others are arguments that JAX is never asked to differentiate, that the step does not
    return, and that the optimizer has never seen. Of a stack it has the trainable rows, where the
    package has gradients and updates of all, zero for the others: more memory and traffic.
    """

    def step(trainable: Any, opt_state: Any, frozen: Any, batch: Any) -> tuple[Any, Any, Any]:
        def loss_fn(trainable: Any) -> jax.Array:
            if not isinstance(problem.model, GPT):
                return problem.loss({**frozen, **trainable}, batch)
            blocks = [tree["blocks"] for tree in (frozen, trainable) if "blocks" in tree]
            return loss_by_hand(problem.model, {**frozen, **trainable}, blocks, batch)

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    tx, (trainable, frozen) = muon_by_hand(), _parts(problem, depth)
    trainable = jax.tree.map(jnp.copy, trainable)  # to be overwritten
    kept, function = [trainable, tx.init(trainable)], jax.jit(step, donate_argnums=(0, 1))
    return Program(head | {"program": "by hand"}, function, kept, frozen, problem.batch)


def _parts(problem: Problem, depth: int) -> tuple[Any, Any]:
    """The parameters of the layers from a depth on, and of those before it."""
    params, names = problem.params, problem.layers.names
    first = 0  # trainable row of a stack
    if isinstance(problem.model, GPT):
        first = max(depth - 1, 0)
        names = [
            "tokens",
            "positions",
            *["blocks"] * problem.model.num_blocks,
            "final_norm",
            "head",
        ]
        depth = depth + 1 if depth else 0  # the first two names are one layer
    parts = []
    for own, rows in ((names[depth:], slice(first, None)), (names[:depth], slice(first))):
        parts.append({name: params[name] for name in own})
        if "blocks" in own:
            parts[-1]["blocks"] = jax.tree.map(lambda leaf, rows=rows: leaf[rows], params["blocks"])
    return parts[0], parts[1]


def loss_by_hand(model: GPT, params: Any, blocks: Sequence[Any], batch: Any) -> jax.Array:
    """The loss of a GPT by a `lax.scan` for each element of `blocks`, which are consecutive rows.

    Without a policy each block is rematerialized, with one none is.
    """
    tokens, labels = batch
    block = Block(model.num_heads)

    def run(x: Any, row: Any) -> tuple[Any, None]:
        return block.apply({"params": row}, x), None

    if model.policy is None:
        run = jax.checkpoint(run, prevent_cse=False)
    x: Any = params["tokens"]["embedding"][tokens]
    x += params["positions"]["embedding"][: tokens.shape[1]]
    for rows in blocks:
        x, _ = jax.lax.scan(run, x, rows)
    x = nn.LayerNorm().apply({"params": params["final_norm"]}, x)
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def muon_by_hand() -> optax.GradientTransformation:
    """Muon, all matrices of a stack at once, and Adam for vectors and embeddings."""
    rate = optax.scale_by_learning_rate(LEARNING_RATE)
    lmo = dm.newton_schulz_lmo(shape_factor="muon")

    def of_row(row: optax.Updates) -> optax.Updates:
        updates, _ = lmo.update(row, lmo.init(row))
        return updates

    of_stack = optax.stateless(
        lambda updates, params: jax.vmap(of_row)(updates) if jax.tree.leaves(updates) else updates
    )
    return optax.partition(
        {
            "matrix": optax.chain(dm.momentum(0.9), lmo, rate),
            "stack": optax.chain(dm.momentum(0.9), of_stack, rate),
            "other": optax.chain(optax.scale_by_adam(), rate),
        },
        _labels,
    )


def _labels(params: Any) -> Any:
    def label(path: Any, leaf: jax.Array) -> str:
        stacked = path[0].key == "blocks"
        if leaf.ndim < 2 + stacked or path[-1].key == "embedding":
            return "other"
        return "stack" if stacked else "matrix"

    return jax.tree.map_with_path(label, params)
