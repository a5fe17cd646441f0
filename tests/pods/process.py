"""One process of a pod: `python -m pods.process SETTINGS`, as launch.py starts it.

The last line on standard output is a JSON object: of each network its run, and "disagreements" if
there are several processes.
"""

import contextlib
import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable
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
from meshes import COMPILED_STEPS, Network, make_mesh, shardings

NETWORKS = ("flat", "stacked")
STEPS, SAVE_AT = 8, 4
SEED, OTHER_SEED = 45, 45 + (1 << 40)  # the same lower half


class Run:
    """A training run on a mesh, whose step is compiled once.

    The "flat" network has its depths drawn by the host, in `dm.train_step`, and the mesh from
    `jax.set_mesh`; the "stacked" one has them drawn on the devices, in one program for all, and the
    mesh from `dm.on_mesh`. On one device there is no mesh, as in a program without.
    """

    def __init__(self, mesh: Mesh, network: str):
        self.network = Network(is_stacked=network == "stacked")
        self.sampler = dm.DepthSampler(self.network.layers, dm.uniform_depth(), seed=SEED)
        optimizer = dm.drop_muon(optax.linear_schedule(0.1, 0.02, STEPS), self.network.layers)
        of_params = shardings(mesh, self.network.specs)
        self.placed = of_params, dm.state_shardings(optimizer, self.network.params, of_params)
        # Else XLA chooses, and the next step is compiled again for what it has chosen.
        out = *self.placed, NamedSharding(mesh, P())
        self.optimizer, self.scope = optimizer, contextlib.nullcontext()
        if network == "flat":
            self.scope = jax.set_mesh(mesh) if mesh.size > 1 else self.scope
            self.step = dm.train_step(self.network.loss, optimizer, self.sampler, out_shardings=out)
            before = len(COMPILED_STEPS)
            self.num_programs = lambda: len(COMPILED_STEPS) - before
            return
        if mesh.size > 1:
            self.optimizer = dm.on_mesh(optimizer, shardings=of_params)
        jitted = jax.jit(self._sampled_on_device, donate_argnums=(0, 1), out_shardings=out)
        self.step = lambda step, *inputs: jitted(*inputs, jnp.int32(step))
        self.num_programs = jitted._cache_size

    def _sampled_on_device(self, params: Any, opt_state: Any, batch: Any, count: Any) -> Any:
        depth = self.sampler.sample(count)
        mask = self.sampler.layers.mask(depth)
        gradient = dm.masked_value_and_grad(self.network.loss)
        loss, grads = gradient(params, batch, depth=depth, layer_mask=mask)
        updates, opt_state = self.optimizer.update(grads, opt_state, params, layer_mask=mask)
        return optax.apply_updates(params, updates), opt_state, loss


def train(mesh: Mesh, network: str, folder: Path, *, resumes: bool) -> dict[str, Any]:
    """The depths and losses of steps, the last parameters and state, and how many programs.

    It saves on its way, or starts from what another has saved.
    """
    run = Run(mesh, network)
    params = put(run.network.params, run.placed[0])
    carried = params, jax.jit(run.optimizer.init, out_shardings=run.placed[1])(params)
    start, depths, losses = 0, [], []
    with ocp.StandardCheckpointer() as checkpointer, run.scope:
        if resumes:
            saved = checkpointer.restore(folder / network, {"carried": carried, "step": 0})
            carried, start = saved["carried"], saved["step"]
        run.sampler.check_processes(start)
        for step in range(start, STEPS):
            if step == SAVE_AT and not resumes:
                checkpointer.save(folder / network, {"carried": carried, "step": step})
                checkpointer.wait_until_finished()  # the step overwrites what is saved
            depths.append(run.sampler.depth(step))
            batch = put(run.network.batch(step), NamedSharding(mesh, P(("data", "fsdp"))))
            *carried, loss = run.step(step, *carried, batch)
            losses.append(float(loss))
        # Each process has a part.
        whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(carried)
    last = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(whole)]
    return {"depths": depths, "losses": losses, "last": last, "programs": run.num_programs()}


def put(tree: Any, placed: Any) -> Any:
    """Arrays that all processes have, of which each hands over the parts of its own devices."""

    def place(x: Any, sharding: Any) -> Any:
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    return jax.tree.map(place, tree, jax.tree.broadcast(placed, tree))


def disagree(mesh: Mesh) -> dict[str, str]:
    """What `check_processes` says to processes of which the second differs in one thing.

    Without a mesh, with one, and in the first call of a `train_step`; after each all go on, so that
    none is left waiting. Before, the first draws by itself: that it comes to an end shows that a
    draw waits for nobody.
    """
    layers, is_second = Network(is_stacked=False).layers, jax.process_index() == 1
    usual = dm.DepthSampler(layers, dm.uniform_depth(), seed=SEED)
    if not is_second:
        usual.depth(0)
    others = {
        "nothing": usual,
        "seed": dm.DepthSampler(layers, dm.uniform_depth(), seed=OTHER_SEED),
        "layers": dm.DepthSampler(layers.group(2), dm.uniform_depth(), seed=SEED),
        "distribution": dm.DepthSampler(layers, dm.full_depth(), seed=SEED),
    }
    said = {"step": words_of(usual.check_processes, STEPS + is_second)}
    for name, other in others.items():
        sampler = other if is_second else usual
        said[name] = words_of(sampler.check_processes, STEPS)
        with jax.set_mesh(mesh):
            said[f"{name}, on a mesh"] = words_of(sampler.check_processes, STEPS)
        step_fn = dm.train_step(lambda params: 0.0, dm.muon(0.1), sampler)
        if name != "nothing":
            said[f"{name}, in a step"] = words_of(step_fn, STEPS, None, None)
    return said


def words_of(function: Callable[..., Any], *args: Any) -> str:
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return ""


def join(
    num_processes: int, number: int, address: str, time_limit: float, axes: dict[str, int]
) -> Mesh:
    """Joins the pod, if it has several processes; the mesh over the devices of all."""
    # Says where it hangs, and ends by itself even if nobody is left to end it.
    faulthandler.dump_traceback_later(0.9 * time_limit, exit=True)
    if num_processes > 1:
        jax.distributed.initialize(
            address,
            num_processes,
            number,
            coordinator_bind_address=address,  # by default that is any address
            initialization_timeout=int(time_limit / 2),
        )
    assert (jax.process_count(), jax.device_count()) == (num_processes, np.prod([*axes.values()]))
    return make_mesh(**axes)


def run(main: Callable[..., None]) -> None:
    """Runs `main` with the settings of the command line, and leaves nobody waiting if it fails."""
    try:
        main(**json.loads(sys.argv[1]))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # `sys.exit` would wait for the others, and they for this one


def main(
    num_processes: int,
    number: int,
    address: str,
    time_limit: float,
    axes: dict[str, int],
    saved: str,
    resumes: bool,
) -> None:
    """Joins the pod, if it has several processes, and does what the others do."""
    mesh = join(num_processes, number, address, time_limit, axes)
    answers: dict[str, Any] = {"disagreements": disagree(mesh)} if num_processes > 1 else {}
    for network in NETWORKS:
        answers[network] = train(mesh, network, Path(saved), resumes=resumes)
    print(json.dumps(answers), flush=True)
    if num_processes > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    run(main)
