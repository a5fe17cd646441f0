"""The graphs in JAX: as people write them, a program for each step, and many steps in one."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from graphs.problems import HEADS, GraphName, Problem

Params = dict[str, jax.Array]
Loss = Callable[[Params, jax.Array, jax.Array], jax.Array]


def _tiny(p: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    del x, y
    c, d = p["a"] + p["b"], p["a"] * p["b"] + p["b"] ** 3
    return (c - d) ** 2 / 2


def _small(p: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    del x, y
    a, b = p["a"], p["b"]
    c, d = a + b, a * b + b**3
    c = c + c + 1
    c = c + 1 + c - a
    d = d + 2 * d + jax.nn.relu(b + a)
    d = d + 3 * d + jax.nn.relu(b - a)
    f = (c - d) ** 2
    return f / 2 + 10 / f


def _mlp(p: Params, x: jax.Array, y: jax.Array, *, one_hot: bool) -> jax.Array:
    embedded = _rows(p["embedding"], x, one_hot).reshape(len(x), -1)
    hidden = jnp.tanh(embedded @ p["hidden/kernel"] + p["hidden/bias"])
    return _cross_entropy(hidden @ p["head/kernel"] + p["head/bias"], y, one_hot)


def _gpt(p: Params, x: jax.Array, y: jax.Array, *, one_hot: bool) -> jax.Array:
    batch, length = x.shape
    mask = np.tril(np.ones((length, length), bool))

    def norm(name: str, h: jax.Array) -> jax.Array:
        h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-5)
        return h * p[name + "/scale"] + p[name + "/bias"]

    h = _rows(p["tokens"], x, one_hot) + p["positions"]
    attend = _attend_in_lanes if one_hot else _attend
    for block in range(sum(name.endswith("up/bias") for name in p)):
        of = f"{block}/"
        parts = jnp.split(norm(of + "norm_1", h) @ p[of + "attention/kernel"], 3, -1)
        mixed = attend(*(part.reshape(batch, length, HEADS, -1) for part in parts), mask)
        h = h + mixed.reshape(h.shape) @ p[of + "out/kernel"] + p[of + "out/bias"]
        up = jax.nn.relu(norm(of + "norm_2", h) @ p[of + "up/kernel"] + p[of + "up/bias"])
        h = h + up @ p[of + "down/kernel"] + p[of + "down/bias"]
    return _cross_entropy(norm("norm", h) @ p["head/kernel"] + p["head/bias"], y, one_hot)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray) -> jax.Array:
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def _attend_in_lanes(q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray) -> jax.Array:
    """The same with examples and heads along the last axis, where a CPU has its lanes.

    Products of 8 × 4 matrices, one after another, would be most of the time.
    """
    lanes = q.shape[0] * q.shape[2]
    q, k, v = (z.transpose(1, 3, 0, 2).reshape(z.shape[1], z.shape[3], lanes) for z in (q, k, v))
    scores = (q[:, None] * k[None]).sum(2) / math.sqrt(q.shape[1])  # to, from, lanes
    weights = jax.nn.softmax(jnp.where(mask[..., None], scores, -jnp.inf), axis=1)
    mixed = (weights[:, :, None] * v[None]).sum(1)
    return mixed.reshape(*mixed.shape[:2], -1, HEADS).transpose(2, 0, 3, 1)


def _rows(table: jax.Array, index: jax.Array, one_hot: bool) -> jax.Array:
    """table[index]; by a product, whose derivative is one too, and no loop over rows."""
    return jax.nn.one_hot(index, len(table), dtype=table.dtype) @ table if one_hot else table[index]


def _cross_entropy(logits: jax.Array, labels: jax.Array, one_hot: bool) -> jax.Array:
    if not one_hot:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    of_labels = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, of_labels).mean()


def graph_loss(graph: GraphName, *, one_hot: bool) -> Loss:
    """Of parameters, inputs and labels; without gathers and scatters, if `one_hot`."""
    match graph:
        case "tiny":
            return _tiny
        case "small":
            return _small
        case "mlp":
            return functools.partial(_mlp, one_hot=one_hot)
        case "gpt":
            return functools.partial(_gpt, one_hot=one_hot)


class Training:
    """A graph on its way.

    Args:
        graph: Its name.
        problem: Where it starts, and its batches.
        at_once: How many steps are one program; 1 is a program for each, as people write it.
    """

    def __init__(self, graph: GraphName, problem: Problem, at_once: int):
        loss_fn, rate = graph_loss(graph, one_hot=at_once > 1), problem.rate
        self.problem, self.at_once, self.count = problem, at_once, 0

        def step(params: Params, batch: tuple[jax.Array, jax.Array]) -> tuple[Params, jax.Array]:
            loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
            return jax.tree.map(lambda p, g: p - rate * g, params, grads), loss

        def steps(params: Params, inputs: jax.Array, labels: jax.Array) -> Any:
            params, losses = jax.lax.scan(step, params, (inputs, labels))
            return params, losses[-1]

        self.params = jax.tree.map(jnp.asarray, problem.params)
        function = steps if at_once > 1 else lambda params, *batch: step(params, batch)
        begin = time.perf_counter()
        self._program = jax.jit(function, donate_argnums=0)
        self._program.lower(self.params, *self._batch()).compile()
        self.seconds_to_compile = time.perf_counter() - begin

    def _batch(self) -> tuple[np.ndarray, np.ndarray]:
        rows = slice(first := self.count % len(self.problem.inputs), first + self.at_once)
        found = self.problem.inputs[rows], self.problem.labels[rows]
        return found if self.at_once > 1 else (found[0][0], found[1][0])

    def run(self, num_steps: int) -> dict[str, float]:
        """So many steps from where it was, a multiple of those at once, and the last loss."""
        loss, begin = jnp.nan, time.perf_counter()
        for _ in range(num_steps // self.at_once):
            self.params, loss = self._program(self.params, *self._batch())
            jax.block_until_ready(loss)
            self.count += self.at_once
        return {"seconds": time.perf_counter() - begin, "loss": float(loss)}
