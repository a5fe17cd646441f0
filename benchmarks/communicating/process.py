"""One of the processes of `benchmarks/processes.py`, which starts it with its settings as JSON.

It goes on from the newest checkpoint in its folder, if there is one. The first process writes the
loss of every step, and at the end what all have found.
"""

import functools
import hashlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dropmuon_jax as dm
from communicating.task import METHODS, GPTSettings, make_optimizer, make_task
from counting.collectives import read_traffic
from records import write_json


def train(settings: dict[str, Any], folder: Path, workers: int) -> None:
    """Trains to the last step, with a checkpoint from time to time."""
    mesh = jax.make_mesh((workers,), ("workers",), axis_types=(AxisType.Auto,))
    of_worker, everywhere = (NamedSharding(mesh, spec) for spec in (P("workers"), P()))
    known = {name: settings[name] for name in GPTSettings.model_fields if name != "output_dir"}
    task = make_task(GPTSettings(output_dir=folder, **known))
    method, num_steps = METHODS[settings["method"]], settings["num_steps"]
    distribution = dm.uniform_depth() if method.drops else dm.full_depth()
    sampler = dm.DepthSampler(task.layers, distribution, seed=0)

    def optimizer(rate: Any) -> Any:
        return make_optimizer(method, task, rate, mesh, auxiliary_rate=settings["auxiliary_rate"])

    specs = dm.compression.worker_specs(jax.eval_shape(lambda: optimizer(1.0).init(task.params(0))))
    of_state = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    params = jax.jit(lambda: task.params(0), out_shardings=everywhere)()
    state = jax.jit(optimizer(1.0).init, out_shardings=of_state)(params)
    dm.compression.check_processes(state)
    placed = (everywhere, of_state, everywhere)

    @functools.partial(
        jax.jit, static_argnames="depth", donate_argnums=(0, 1), out_shardings=placed
    )
    def step(params: Any, state: Any, batches: Any, rate: Any, *, depth: int) -> Any:
        gradient = jax.value_and_grad(lambda of, batch: task.loss(of, batch, depth))
        losses, grads = jax.vmap(gradient, in_axes=(None, 0))(params, batches)
        updates, state = optimizer(rate).update(grads, state, params, depth=depth)
        return optax.apply_updates(params, updates), state, losses

    def inputs(i: int) -> Any:
        mine = task.batches(0, i)[jax.process_index()][None]
        rate = np.float32(settings["rate"] * (1 - i / num_steps))
        return jax.make_array_from_process_local_data(of_worker, mine), rate

    is_first, losses = jax.process_index() == 0, []
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder / "checkpoints", options=options) as manager:
        start = manager.latest_step() or 0
        if start:
            carried = {"params": params, "state": state}
            restored: Any = manager.restore(start, args=ocp.args.StandardRestore(carried))
            params, state = restored["params"], restored["state"]
        sampler.check_processes(start)
        received = {}
        for depth in range(task.layers.num_layers):
            compiled = step.lower(params, state, *inputs(0), depth=depth).compile()
            # The losses, which a worker gathers to say them, count too: four bytes each.
            received[depth] = round(read_traffic(compiled.as_text() or "", workers)[1])
            if not method.drops:
                break
        for i in range(start, num_steps):
            if i > start and i % settings["checkpoint_every"] == 0:
                carried = {"params": params, "state": state}
                manager.save(i, args=ocp.args.StandardSave(carried))
            params, state, of_workers = step(params, state, *inputs(i), depth=sampler.depth(i))
            losses.append(float(np.mean(np.asarray(of_workers))))
            if is_first:
                with (folder / "losses.jsonl").open("a") as file:
                    file.write(json.dumps(losses[-1]) + "\n")
    whole = jax.jit(lambda of: of, out_shardings=everywhere)((params, state))
    bits = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(whole))
    digest = np.frombuffer(hashlib.sha256(bits).digest(), np.uint8)
    everyone = jnp.asarray(_gathered(digest))
    if not bool((everyone == everyone[0]).all()):
        raise RuntimeError("The processes have ended with different parameters or states.")
    if is_first:
        answers = {"start": start, "losses": losses, "received_by_depth": received}
        write_json(folder / "answers.json", answers | {"digest": bytes(digest).hex()})


def _gathered(x: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x))


def main(settings: dict[str, Any], address: str, number: int, folder: str, heartbeat: int) -> None:
    """Joins the other processes, and trains with them."""
    workers = settings["num_workers"]
    jax.distributed.initialize(
        address,
        num_processes=workers,
        process_id=number,
        coordinator_bind_address=address,
        heartbeat_timeout_seconds=heartbeat,
    )
    train(settings, Path(folder), workers)
    jax.distributed.shutdown()


if __name__ == "__main__":
    try:
        main(**json.loads(sys.argv[1]))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # `sys.exit` would wait for the others, and they for this one
