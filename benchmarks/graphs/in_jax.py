"""The graphs in JAX: as people write them, a program for each step, and many steps in one."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from graphs.layers import FAST, PLAIN, Layers
from graphs.problems import HEADS, GraphName, Problem

Params = dict[str, jax.Array]
# XLA's CPU backend otherwise copies most parameters in each round of a loop.
_OF_LOOPS = {"xla_cpu_copy_insertion_use_region_analysis": True}
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


def _mlp(p: Params, x: jax.Array, y: jax.Array, *, layers: Layers) -> jax.Array:
    embedded = layers.rows(p["embedding"], x).reshape(len(x), -1)
    hidden = jnp.tanh(layers.dense(embedded, p["hidden/kernel"], p["hidden/bias"]))
    return layers.cross_entropy(layers.dense(hidden, p["head/kernel"], p["head/bias"]), y)


def _gpt(p: Params, x: jax.Array, y: jax.Array, *, layers: Layers) -> jax.Array:
    def norm(name: str, h: jax.Array) -> jax.Array:
        return layers.norm(h, p[name + "/scale"], p[name + "/bias"])

    def dense(name: str, h: jax.Array) -> jax.Array:
        return layers.dense(h, p[name + "/kernel"], p[name + "/bias"])

    h = layers.rows(p["tokens"], x) + p["positions"]
    for block in range(sum(name.endswith("up/bias") for name in p)):
        of = f"{block}/"
        qkv = layers.linear(norm(of + "norm_1", h), p[of + "attention/kernel"])
        h = h + dense(of + "out", layers.attend(qkv, HEADS))
        h = h + dense(of + "down", jax.nn.relu(dense(of + "up", norm(of + "norm_2", h))))
    return layers.cross_entropy(dense("head", norm("norm", h)), y)


def graph_loss(graph: GraphName, layers: Layers = PLAIN) -> Loss:
    """Of parameters, inputs and labels."""
    match graph:
        case "tiny":
            return _tiny
        case "small":
            return _small
        case "mlp":
            return functools.partial(_mlp, layers=layers)
        case "gpt":
            return functools.partial(_gpt, layers=layers)


class Training:
    """A graph on its way.

    Args:
        graph: Its name.
        problem: Where it starts, and its batches.
        at_once: How many steps are one program; 1 is a program for each, as people write it.
    """

    def __init__(self, graph: GraphName, problem: Problem, at_once: int):
        loss_fn, rate = graph_loss(graph, FAST if at_once > 1 else PLAIN), problem.rate
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
        options = _OF_LOOPS if at_once > 1 and jax.default_backend() == "cpu" else {}
        self._program = jax.jit(function, donate_argnums=0, compiler_options=options)
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
