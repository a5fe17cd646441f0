"""Workers in processes of their own: `python -m pods.workers SETTINGS`, as launch.py starts it.

Each has data of its own, and sends what is new in its momentum, compressed. The last line on
standard output is a JSON object: the losses, a digest of the last parameters and state, and what
`check_processes` says if the second process has another seed or compressor.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dropmuon_jax as dm
from dropmuon_jax.compression import Natural, RankK, TopK
from meshes import Network, normal
from pods.process import join, put, run, words_of

STEPS, SAVE_AT, SEED = 6, 3, 7
DEPTHS = (0, 2, 1, 0, 1, 2)  # frozen layers are active again after the restart
COMPRESSOR = RankK(4, Natural(8), method="warm")


def train(mesh: Mesh, folder: Path, *, resumes: bool) -> dict[str, Any]:
    """The losses and the last bits of steps, which are saved on the way or begin from there."""
    network, count = Network(is_stacked=False), mesh.shape["workers"]
    of_worker, of_all = (NamedSharding(mesh, spec) for spec in (P("workers"), P()))
    tx = dm.compression.drop_ef21_muon(0.05, network.layers, COMPRESSOR, seed=SEED)
    tx = dm.compression.on_workers(tx, mesh)
    params = put(network.params, of_all)
    specs = dm.compression.worker_specs(jax.eval_shape(tx.init, params))
    placed = of_all, jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    state = jax.jit(tx.init, out_shardings=placed[1])(params)
    dm.compression.check_processes(state)

    @functools.partial(jax.jit, static_argnames="depth", out_shardings=(*placed, of_all))
    def step(params: Any, state: Any, batches: Any, depth: int) -> Any:
        per_worker = jax.vmap(jax.value_and_grad(network.loss), in_axes=(None, 0))
        losses, grads = per_worker(params, batches)
        updates, state = tx.update(grads, state, params, depth=depth)
        return optax.apply_updates(params, updates), state, losses

    losses, start = [], 0
    with ocp.StandardCheckpointer() as checkpointer:
        if resumes:
            saved = {"carried": (params, state), "step": 0}
            saved = checkpointer.restore(folder / "workers", saved)
            (params, state), start = saved["carried"], saved["step"]
        for i in range(start, STEPS):
            if i == SAVE_AT and not resumes:
                saved = {"carried": (params, state), "step": i}
                checkpointer.save(folder / "workers", saved)
                checkpointer.wait_until_finished()
            batches = put(normal((count, 16, 8), seed=i + 1).astype(float), of_worker)
            params, state, of_workers = step(params, state, batches, depth=DEPTHS[i])
            losses.append(np.asarray(of_workers).tolist())
    whole = jax.jit(lambda x: x, out_shardings=of_all)((params, state))
    bits = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(whole))
    # What differs between workers must not have become one and the same on the way.
    own = [x for x in jax.tree.leaves(whole[1]) if x.ndim > 2 and x.shape[0] == count]
    differ = all(not np.array_equal(x[0], x[1]) for x in own) and len(own) > 0
    return {"losses": losses, "bits": hashlib.sha256(bits).hexdigest(), "differ": differ}


def average(mesh: Mesh) -> str:
    """The last bits of rounds of clients that send all of their gradients, in float32."""
    count, spec = mesh.shape["workers"], NamedSharding(mesh, P("workers"))
    tx = dm.compression.on_workers(dm.privacy.norm_ec(1.0, 0.5, server_normalization=False), mesh)
    params = put({"w": np.zeros((67, 31), np.float32)}, NamedSharding(mesh, P()))
    specs = dm.compression.worker_specs(jax.eval_shape(tx.init, params))
    placed = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    state = jax.jit(tx.init, out_shardings=placed)(params)
    update = jax.jit(tx.update, out_shardings=(NamedSharding(mesh, P()), placed))
    updates = params
    for i in range(3):
        grads = put({"w": normal((count, 67, 31), seed=i).astype(np.float32)}, spec)
        updates, state = update(grads, state, params)
    return hashlib.sha256(np.asarray(updates["w"]).tobytes()).hexdigest()


def disagree() -> dict[str, str]:
    """What the check says to processes of which the second differs in one thing."""
    second, params = jax.process_index() == 1, {"w": jnp.ones((3, 3))}
    made = {
        "nothing": (TopK(2), 0),
        "seed": (TopK(2), int(second)),
        "compressor": (TopK(1 + second), 0),
    }
    return {
        name: words_of(
            dm.compression.check_processes, dm.compression.ef21(of, seed=seed).init(params)
        )
        for name, (of, seed) in made.items()
    }


def main(
    num_processes: int,
    number: int,
    address: str,
    time_limit: float,
    axes: dict[str, int],
    saved: str,
    resumes: bool,
) -> None:
    """Joins the others, if there are any, and trains with them."""
    mesh = join(num_processes, number, address, time_limit, axes)
    answers = train(mesh, Path(saved), resumes=resumes)
    answers["averaged"] = average(mesh)
    if num_processes > 1:
        answers["disagreements"] = disagree()
    print(json.dumps(answers), flush=True)
    if num_processes > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    run(main)
