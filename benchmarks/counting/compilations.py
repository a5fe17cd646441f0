"""A process that compiles all depths of a training step in one way, and says what it took."""

import functools
import json
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dropmuon_jax as dm
from counting.problems import LEARNING_RATE, NUM_HEADS, VOCABULARY
from models import Transformer

WAYS = ("one after the other", "compile()", "compile(), update by layer")


def make(width: int, blocks: int, context: int, batch_size: int) -> tuple[Any, ...]:
    """Loss, optimizer, layers and parameters of a GPT, of which each block is a layer; a batch."""
    model = Transformer(VOCABULARY, width, NUM_HEADS, blocks)
    shape = batch_size, context + 1
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=shape, dtype=np.int32)
    batch = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    params = jax.jit(model.init)(jax.random.key(0), batch[0][:1])["params"]
    of_blocks = [(f"attention_{i}", f"feed_forward_{i}") for i in range(blocks)]
    layers = dm.layers_by_path(params, ["embedding", *of_blocks, "head"])

    def loss(params: Any, batch: Any) -> jax.Array:
        logits: Any = model.apply({"params": params}, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return loss, dm.drop_muon(LEARNING_RATE, layers), layers, params, batch


def compile_all(way: str, problem: Sequence[Any]) -> None:
    """Traces, lowers and compiles every depth: of a step of one's own, or by the call."""
    loss, optimizer, layers, params, batch = problem
    state = optimizer.init(params)
    if way == WAYS[0]:

        @functools.partial(jax.jit, static_argnames="depth", donate_argnums=(0, 1))
        def step(params: Any, state: Any, batch: Any, depth: int) -> Any:
            mask = layers.mask(depth)
            value, grads = dm.masked_value_and_grad(loss)(params, batch, layer_mask=mask)
            updates, state = optimizer.update(grads, state, params, layer_mask=mask)
            return optax.apply_updates(params, updates), state, value

        for depth in range(layers.num_layers):
            step.trace(params, state, batch, depth=depth).lower().compile()
        return
    make_step(way == WAYS[2], problem).compile(params, state, batch)


def make_step(by_layer: bool, problem: Sequence[Any], depths: Any = None) -> dm.TrainStep:
    """The call, for all depths or some."""
    loss, optimizer, layers, _, _ = problem
    sampler = dm.DepthSampler(layers, depths or dm.uniform_depth(), seed=0)
    return dm.train_step(loss, optimizer, sampler, update_by_layer=by_layer)


def time_steps(problem: Sequence[Any], depth: int, rounds: int) -> list[list[float]]:
    """Seconds of steps at a depth in turns: of one program, and by layer."""
    *_, layers, params, batch = problem
    only = dm.fixed_depth(np.eye(layers.num_layers)[depth].tolist())
    found: list[list[float]] = [[], []]
    steps = [make_step(by_layer, problem, only) for by_layer in (False, True)]
    runs = [[jax.tree.map(jnp.copy, params)] for _ in steps]
    for run in runs:
        run.append(problem[1].init(params))
    for number in range(rounds + 2):  # the first two compile and warm up
        for i in (0, 1) if number % 2 else (1, 0):
            begin = time.perf_counter()
            *runs[i], loss = steps[i](number, *runs[i], batch)
            jax.block_until_ready((runs[i], loss))
            if number > 1:
                found[i].append(round(time.perf_counter() - begin, 6))
    return found


def main(way: str, sizes: dict[str, int], rounds: int) -> None:
    """Prints a record of one start, or of steps where the way is "steps"."""
    problem, events = make(**sizes), []
    if way == "steps":
        depths = sorted({0, sizes["blocks"] // 2, sizes["blocks"] + 1})
        print(json.dumps({depth: time_steps(problem, depth, rounds) for depth in depths}))
        return
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    compile_all(way, problem)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    hits, misses = (events.count(f"/jax/compilation_cache/cache_{x}") for x in ("hits", "misses"))
    print(json.dumps({"processor": used, "wall": seconds, "hits": hits, "misses": misses}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
