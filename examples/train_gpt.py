"""Trains a small GPT on text with Drop-Muon: to be copied.

    pip install '.[examples]'
    python examples/train_gpt.py --folder runs/first --steps 300
    tensorboard --logdir runs

A run that was killed goes on from its last checkpoint when the command is given again, and ends
with the parameters that it would have had, bit for bit. On several devices parameters are sharded
and batches divided.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers
from tensorboardX import SummaryWriter

import dropmuon_jax as dm


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a small GPT on the bytes of a text."""

    folder: Path
    """For checkpoints and logs. A run that lies there goes on."""
    text: tuple[Path, ...] = ()
    """Files to learn, by default the manual that comes with Python."""
    depths: Literal["time_aware", "uniform", "full"] = "time_aware"
    """Which layers a step updates; full is Muon."""
    layers: int = 4
    """Into so many the blocks are grouped: each is a depth, and a program to compile."""
    steps: int = 300
    batch_size: int = 32
    context: int = 64
    width: int = 128
    blocks: int = 6
    heads: int = 4
    learning_rate: float = 0.05
    auxiliary_learning_rate: float = 0.003
    warmup: int = 20
    weight_decay: float = 0.01
    seed: int = 0
    log_every: int = 10
    save_every: int = 100


class Block(nnx.Module):
    """Attention and a perceptron, each behind a norm and beside a residual."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width = config.width
        self.before_attention = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(config.heads, width, decode=False, rngs=rngs)
        self.before_mlp = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.before_attention(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.before_mlp(x))))


class GPT(nnx.Module):
    """From bytes to the logits of the byte behind each."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, config.width, rngs=rngs)
        self.positions = nnx.Embed(config.context, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.blocks)])
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_fn(model: GPT, window: jax.Array) -> jax.Array:
    """Nats a byte."""
    logits = model(window[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()


class Windows(grain.RandomAccessDataSource):
    """The windows of a text, and the byte behind each: what grain shuffles."""

    def __init__(self, text: np.ndarray, context: int):
        self._text, self._context = text, context

    def __len__(self) -> int:
        return (len(self._text) - 1) // self._context

    def __getitem__(self, index: Any) -> np.ndarray:
        start = int(index) * self._context
        return self._text[start : start + self._context + 1].astype(np.int32)


def read(config: Config) -> np.ndarray:
    """All bytes of the text."""
    if config.text:
        text = b"".join(path.read_bytes() for path in config.text)
    else:
        from pydoc_data.topics import topics

        text = "".join(topics[name] for name in sorted(topics)).encode()
    return np.frombuffer(text, np.uint8)


def batches(text: np.ndarray, config: Config, first_step: int) -> Any:
    """Batches from a step on, which are a function of seed and step."""
    dataset = grain.MapDataset.source(Windows(text, config.context)).seed(config.seed)
    dataset = dataset.shuffle().repeat().batch(config.batch_size, drop_remainder=True)
    return iter(dataset[first_step:].to_iter_dataset())


def shard(params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Each matrix along its first axis that the devices divide; everything else on all of them."""

    def of_leaf(leaf: jax.Array) -> NamedSharding:
        for axis, size in enumerate(leaf.shape if leaf.ndim > 1 else ()):
            if size % mesh.size == 0:
                return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(of_leaf, params)


def make_optimizer(config: Config, layers: dm.Layers) -> optax.GradientTransformationExtraArgs:
    """Drop-Muon, with Adam for what is no matrix; both rates warm up and fall to 0."""

    def rate(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup, config.steps)

    # Kernels (in, heads, size) and (heads, size, out) are matrices once it is said how.
    axes = {f"{name}/kernel": MuonDimensionNumbers(0, (1, 2)) for name in ("query", "key", "value")}
    return dm.drop_muon(
        rate(config.learning_rate),
        layers,
        dimension_numbers=axes | {"out/kernel": MuonDimensionNumbers((0, 1), 2)},
        weight_decay=config.weight_decay,
        auxiliary_learning_rate=rate(config.auxiliary_learning_rate),
    )


def main(config: Config) -> None:
    """Trains until the last step, from the newest checkpoint in the folder if there is one."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    model = GPT(config, nnx.Rngs(config.seed))
    shardings = shard(nnx.state(model, nnx.Param), mesh)
    params = jax.device_put(nnx.state(model, nnx.Param), shardings)
    nnx.update(model, params)

    blocks = [f"blocks/{i}" for i in range(config.blocks)]
    patterns = [("embed", "positions", blocks[0]), *blocks[1:], ("norm", "head")]
    layers = dm.layers_by_path(params, patterns).group(config.layers)
    optimizer = dm.on_mesh(make_optimizer(config, layers), shardings=shardings)
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=config.seed)
    if config.depths == "full":
        sampler = dm.DepthSampler(layers, dm.full_depth(), seed=config.seed)
    if config.depths == "time_aware":  # by the FLOPs of a step at each depth, which are traced
        window = jax.ShapeDtypeStruct((config.batch_size, config.context + 1), jnp.int32)
        uniform = dm.train_step(loss_fn, optimizer, sampler)
        state = jax.eval_shape(optimizer.init, params)
        counted = dm.check_depths(uniform, layers, model, state, window)
        print(counted)
        sampler = dm.DepthSampler(layers, dm.time_aware_depth(counted.flops), seed=config.seed)
        optimizer = dm.record_gains(optimizer, sampler)
    placed = dm.state_shardings(optimizer, params)
    opt_state = jax.jit(optimizer.init, out_shardings=placed)(params)
    step_fn = dm.train_step(loss_fn, optimizer, sampler, out_shardings=(shardings, placed))
    validate = nnx.jit(loss_fn)

    text = read(config)
    train, held_out = np.split(text, [len(text) * 9 // 10])
    own = NamedSharding(mesh, PartitionSpec("data"))
    validation = jax.device_put(next(batches(held_out, config, 0)), own)

    options = ocp.CheckpointManagerOptions(save_interval_steps=config.save_every, max_to_keep=2)
    folder = (config.folder / "checkpoints").absolute()
    with ocp.CheckpointManager(folder, options=options) as saved:
        step, done = 0, saved.latest_step()
        if done is not None:
            like = {"params": nnx.to_pure_dict(params), "opt_state": opt_state}
            restored = saved.restore(done, args=ocp.args.StandardRestore(like))
            nnx.replace_by_pure_dict(params, restored["params"])
            nnx.update(model, params)
            opt_state, step = restored["opt_state"], done + 1
            dm.check_state(optimizer, params, opt_state, layers)
            print(f"Goes on with step {step}.", flush=True)

        log = SummaryWriter(str(config.folder / "logs"), purge_step=step)
        data, start, first = batches(train, config, step), time.perf_counter(), step
        for step in range(first, config.steps):
            batch = jax.device_put(next(data), own)
            model, opt_state, loss = step_fn(step, model, opt_state, batch)
            is_last = step == config.steps - 1
            if step % config.log_every == 0 or is_last:  # what is read makes the host wait
                values = {"train": float(loss), "validation": float(validate(model, validation))}
                values["steps per second"] = (step + 1 - first) / (time.perf_counter() - start)
                for name, value in values.items():
                    log.add_scalar(name, value, step)
                log.flush()
                said = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
                print(f"step {step}: {said}", flush=True)
            if saved.should_save(step) or is_last:
                trained = nnx.to_pure_dict(nnx.state(model, nnx.Param))
                run = {"params": trained, "opt_state": opt_state}
                saved.save(step, args=ocp.args.StandardSave(run), force=True)
        log.close()


if __name__ == "__main__":
    main(tyro.cli(Config))
