"""A training run on a mesh, which saves on its way and starts from what another mesh has saved."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dropmuon_jax as dm
from pods.networks import Network, make_network

STEPS = 8
# Every layer but the last is inactive in a step and active in a later one, both before step 4 and
# after it, where the "cnn" is left with two depths to compile.
SEED = 45


class Run(NamedTuple):
    """What runs on a mesh."""

    network: Network
    optimizer: optax.GradientTransformationExtraArgs
    params: Any
    """Shapes, dtypes and shardings."""
    opt_state: Any
    """Shapes, dtypes and shardings."""
    step: Callable[[int, Any, Any, Any], tuple[Any, Any, Any]]
    """From a number, parameters, state and batch to new parameters, a new state and the loss."""
    num_programs: Callable[[], int]
    """How many there are of the step."""


def make_mesh(data: int, fsdp: int) -> Mesh:
    """Over all devices of all processes."""
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def make_sampler(name: str) -> dm.DepthSampler:
    """A new one, which remembers no draws."""
    network = make_network(name)
    layers = dm.layers_by_path(jax.eval_shape(network.init, jax.random.key(0)), network.patterns)
    return dm.DepthSampler(layers, dm.uniform_depth(), seed=SEED)


def make_optimizer(layers: dm.Layers) -> optax.GradientTransformationExtraArgs:
    """Drop-Muon with a schedule."""
    return dm.drop_muon(
        optax.linear_schedule(0.1, 0.02, STEPS),
        layers,
        # The biases of keys have no gradient but rounding: no reason for steps of full size.
        auxiliary=optax.scale_by_adam(eps=1e-3),
        auxiliary_learning_rate=0.01,
    )


@functools.cache
def make_run(mesh: Mesh, name: str, traced: bool) -> Run:
    """The same one each time, so that a step is compiled once."""
    network, sampler = make_network(name), make_sampler(name)
    layers, init = sampler.layers, functools.partial(network.init, jax.random.key(0))
    optimizer, params = make_optimizer(layers), jax.eval_shape(init)
    shardings = _fsdp(mesh, params)
    placed = dm.state_shardings(optimizer, params, shardings)
    opt_state = _abstract(jax.eval_shape(optimizer.init, params), placed)
    if mesh.size > 1 and name == "gpt":
        optimizer = dm.on_mesh(optimizer, shardings=shardings)
    loss_fn = functools.partial(network.loss, layers=layers)
    # Else XLA chooses, and the next step is compiled again for what it has chosen.
    out_shardings = shardings, placed, NamedSharding(mesh, P())
    if traced:
        jitted = _sampled_on_device(loss_fn, optimizer, sampler, out_shardings)

        def step(number: int, params: Any, opt_state: Any, batch: Any) -> Any:
            return jitted(params, opt_state, batch, jnp.int32(number))
    else:
        step = dm.train_step(loss_fn, optimizer, sampler, out_shardings=out_shardings)
        jitted: Any = step._jitted
    params = _abstract(params, shardings)
    return Run(network, optimizer, params, opt_state, step, jitted._cache_size)


def _sampled_on_device(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformationExtraArgs,
    sampler: dm.DepthSampler,
    out_shardings: Any,
) -> Any:
    """A jitted step in one program for all depths, which it draws itself from its number."""

    def step(params: Any, opt_state: Any, batch: Any, count: Any) -> Any:
        depth = sampler.sample(count)
        mask = sampler.layers.mask(depth)
        loss, grads = dm.masked_value_and_grad(loss_fn)(params, batch, depth=depth, layer_mask=mask)
        updates, opt_state = optimizer.update(grads, opt_state, params, layer_mask=mask)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings)


@functools.cache
def make_init(mesh: Mesh, name: str) -> Callable[[], tuple[Any, Any]]:
    """Of parameters and state, each where it is to lie; whether depths are traced is the same."""
    run = make_run(mesh, name, traced=False)
    of_params, of_state = jax.tree.map(lambda leaf: leaf.sharding, (run.params, run.opt_state))
    init_params = functools.partial(run.network.init, jax.random.key(0))
    jitted = jax.jit(init_params, out_shardings=of_params)
    init_state = jax.jit(run.optimizer.init, out_shardings=of_state)

    def init() -> tuple[Any, Any]:
        params = jitted()
        return params, init_state(params)

    return init


def train(
    mesh: Mesh,
    name: str,
    *,
    traced: bool = False,
    save: str | None = None,
    save_at: int = 0,
    restore: str | None = None,
    result: str,
) -> dict[str, Any]:
    """Trains from step 0, or from a checkpoint.

    The depths are drawn by the host, in `dm.train_step`, or, if they are traced, by the devices. On
    several of them the "cnn" has the mesh from `jax.set_mesh` and the "gpt" from `dm.on_mesh`;
    on one device there is neither, as in a program without a mesh.

    Args:
        mesh: Where.
        name: Of the network.
        traced: Whether depths are drawn on the device, in one program for all.
        save: The folder to save in.
        save_at: Before which step.
        restore: The checkpoint to start from.
        result: The file for parameters and state after the last step, of process 0.

    Returns:
        The "depths" and "losses" of the steps, and how many "programs" there are since the start.
    """
    run, sampler = make_run(mesh, name, traced), make_sampler(name)
    by_rows = NamedSharding(mesh, P(("data", "fsdp")))
    set_mesh = mesh.size > 1 and name == "cnn"
    depths, losses = [], []
    with (
        ocp.StandardCheckpointer() as checkpointer,
        jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext(),
    ):
        if restore is None:
            params, opt_state = make_init(mesh, name)()
            start = 0
        else:
            saved = checkpointer.restore(
                Path(restore), {"params": run.params, "opt_state": run.opt_state, "step": 0}
            )
            params, opt_state, start = saved["params"], saved["opt_state"], saved["step"]
        sampler.check_processes(start)
        for step in range(start, STEPS):
            if save is not None and step == save_at:
                tree = {"params": params, "opt_state": opt_state, "step": step}
                checkpointer.save(Path(save), tree)
                checkpointer.wait_until_finished()  # the next step overwrites what is saved
            depths.append(sampler.depth(step))
            batch = _placed(run.network.batch(step), by_rows)
            params, opt_state, loss = run.step(step, params, opt_state, batch)
            losses.append(loss)
        leaves = jax.tree.leaves((params, opt_state))
        if jax.process_count() > 1:  # which have a part each
            leaves = jax.jit(lambda *x: x, out_shardings=NamedSharding(mesh, P()))(*leaves)
    if jax.process_index() == 0:
        np.savez(result, *map(np.asarray, leaves))
    return {
        "depths": depths,
        "losses": [float(loss) for loss in losses],
        "programs": run.num_programs(),
    }


def _fsdp(mesh: Mesh, shapes: Any) -> Any:
    """The longest axis that "fsdp" divides, but not the leading one of stacked layers."""

    def of_leaf(path: Any, leaf: Any) -> NamedSharding:
        first = 1 if path[0].key == "blocks" else 0
        fits = [i for i in range(first, leaf.ndim) if leaf.shape[i] % mesh.shape["fsdp"] == 0]
        longest = max(fits, key=leaf.shape.__getitem__, default=None)
        return NamedSharding(mesh, P(*("fsdp" if i == longest else None for i in range(leaf.ndim))))

    return jax.tree_util.tree_map_with_path(of_leaf, shapes)


def _abstract(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        shapes,
        shardings,
    )


def _placed(batch: Any, sharding: NamedSharding) -> Any:
    """Each process hands over the rows of its own devices."""
    return jax.tree.map(
        lambda rows: jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__), batch
    )
