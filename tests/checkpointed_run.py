"""A short training run that saves or resumes, for test_checkpoint.py to start in processes.

python checkpointed_run.py START STOP CHECKPOINT_DIR [SAVE…] runs the steps START … STOP - 1, from
the checkpoint unless START is 0, saves at the end and before the steps SAVE, and prints the depths
that it drew.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import dropmuon_jax as dm


def init_params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "stem": {"kernel": jax.random.normal(keys[0], (3, 3, 1, 6)) / 3, "bias": jnp.zeros(6)},
        "mid": {"kernel": jax.random.normal(keys[1], (6, 8)) / 3, "bias": jnp.zeros(8)},
        "head": {"kernel": jax.random.normal(keys[2], (8, 3)) / 3, "bias": jnp.zeros(3)},
    }


def loss_fn(params, x, y):
    x = jax.lax.conv_general_dilated(
        x, params["stem"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jnp.tanh(x + params["stem"]["bias"]).mean(axis=(1, 2))
    x = jnp.tanh(x @ params["mid"]["kernel"] + params["mid"]["bias"])
    return jnp.mean((x @ params["head"]["kernel"] + params["head"]["bias"] - y) ** 2)


def run(start: int, stop: int, directory: Path, saves: tuple[int, ...] = ()) -> list[int]:
    params = init_params()
    layers = dm.layers_by_path(params, ["stem", "mid", "head"])
    sampler = dm.DepthSampler(layers, dm.epoch_shift_depth(20), seed=9)
    tx = dm.drop_muon(optax.linear_schedule(0.1, 0.0, 20), layers)
    state = tx.init(params)
    checkpointer = ocp.StandardCheckpointer()
    if start:
        saved = checkpointer.restore(directory / str(start), {"params": params, "state": state})
        params, state = saved["params"], saved["state"]

    @functools.partial(jax.jit, static_argnames="depth", donate_argnames=("params", "state"))
    def train_step(params, state, x, y, depth):
        mask = layers.mask(depth)
        _, grads = dm.masked_value_and_grad(loss_fn)(params, x, y, layer_mask=mask)
        updates, state = tx.update(grads, state, params, layer_mask=mask)
        return optax.apply_updates(params, updates), state

    def save(step):
        checkpointer.save(directory / str(step), {"params": params, "state": state})
        checkpointer.wait_until_finished()  # the next step overwrites what is saved

    depths = []
    # The step to resume from is in the state itself.
    for step in range(int(optax.tree.get(state, "MomentumState").count), stop):
        if step in saves:
            save(step)
        x_key, y_key = jax.random.split(jax.random.fold_in(jax.random.key(1), step))
        x, y = jax.random.normal(x_key, (5, 6, 6, 1)), jax.random.normal(y_key, (5, 3))
        depths.append(sampler.depth(step))
        params, state = train_step(params, state, x, y, depth=depths[-1])
    save(stop)
    return depths


if __name__ == "__main__":
    start, stop, directory, *saves = sys.argv[1:]
    print(run(int(start), int(stop), Path(directory), tuple(map(int, saves))))
