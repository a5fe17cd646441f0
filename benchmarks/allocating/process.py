"""One of several processes that share the micro-batches of a step; allocate.py starts them.

python benchmarks/allocating/process.py '{"rank": 0, …}' prints a line of JSON.
"""

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import dropmuon_jax as dm

allocation = dm.contrib.allocation


def loss(params: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
    """Of a regression; a micro-batch is rows of inputs and a target."""
    return jnp.mean((jnp.tanh(batch[:, :-1] @ params["w"]) - batch[:, -1]) ** 2)


def micro_batches(step: int, num_tasks: int) -> np.ndarray:
    """All of a step, of which each process takes its own."""
    return np.random.default_rng(step).normal(size=(num_tasks, 8, 5)).astype(np.float32)


def train(of: dict[str, Any]) -> dict[str, Any]:
    """Steps with shares by ATA or equal ones, in which this process is as slow as it is told."""
    rank, num_workers, num_tasks = of["rank"], len(of["slowness"]), of["num_tasks"]
    allocator = allocation.ata_empirical(
        num_workers, num_tasks, eta=of["eta"], width=of["width"], decay=of["decay"]
    )
    allocate, update = jax.jit(allocator.allocate), jax.jit(allocator.update)
    gradient = jax.jit(jax.grad(loss))
    equal = np.asarray(allocation.uniform_allocation(num_workers, num_tasks))
    params, record = {"w": jnp.zeros(4)}, allocator.init()
    jax.block_until_ready((gradient(params, micro_batches(0, 1)[0]), allocate(record)))
    update(record, equal, np.zeros(num_workers, np.float32))
    all_shares, seconds = [], []
    multihost_utils.sync_global_devices("start")
    for step in range(of["num_steps"]):
        start = time.perf_counter()
        shares = np.asarray(allocate(record)) if of["method"] == "ATA" else equal
        slowness = of["slowness"][rank] * (
            of["slower"] if rank == 0 and step >= of["change"] else 1
        )
        first = shares[:rank].sum()
        mine = micro_batches(step, num_tasks)[first : first + shares[rank]]
        total = {"w": np.zeros(4)}
        for batch in mine:
            # Waits stand for work: processes share cores, and would slow each other down.
            time.sleep(of["unit"] * slowness)
            total["w"] += np.asarray(gradient(params, batch)["w"])
        took = time.perf_counter() - start
        told = np.append(total["w"], took).astype(np.float32)
        everybody = multihost_utils.process_allgather(told)
        # The mean over all micro-batches, whoever took them: sums weigh by counts.
        mean = everybody[:, :-1].sum(0) / num_tasks
        params = {"w": params["w"] - 0.1 * mean}
        record = update(record, shares, everybody[:, -1])
        all_shares.append(shares.tolist())
        seconds.append(time.perf_counter() - start)
    return {
        "shares": all_shares,
        "seconds": seconds,
        "params": np.asarray(params["w"], float).tolist(),
    }


def alone(num_steps: int, num_tasks: int) -> list[float]:
    """The parameters of one process that takes all micro-batches."""
    params, gradient = {"w": jnp.zeros(4)}, jax.jit(jax.grad(loss))
    for step in range(num_steps):
        grads = [np.asarray(gradient(params, x)["w"]) for x in micro_batches(step, num_tasks)]
        params = {"w": params["w"] - 0.1 * jnp.asarray(np.mean(grads, 0))}
    return np.asarray(params["w"], float).tolist()


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    jax.distributed.initialize(
        told["address"], num_processes=len(told["slowness"]), process_id=told["rank"]
    )
    print(json.dumps(train(told)), flush=True)
