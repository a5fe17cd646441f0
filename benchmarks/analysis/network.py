"""The smoothness of a network along a run, and the speed-ups that the theory predicts from it."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

import dropmuon_jax as dm
from analysis.search import CRITERIA
from images import Images

Samples = dict[str, dm.planning.SmoothnessSamples]


def cross_entropy(model: nn.Module, params: Any, batch: Any) -> jax.Array:
    """Its mean over a batch of images and labels."""
    images, labels = batch
    logits: Any = model.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def sample_smoothness(
    loss: Callable[[Any, Any], jax.Array],
    tx: optax.GradientTransformation,
    tracker: optax.GradientTransformationExtraArgs,
    params: Any,
    batches: Iterable[Any],
) -> dict[str, Samples]:
    """Of a run: from the gradients of different batches, and from two of the same batch."""
    gradient = jax.grad(loss)

    @jax.jit
    def step(params: Any, prev_params: Any, opt_state: Any, tracked: Any, batch: Any) -> Any:
        grads, second = gradient(params, batch), gradient(prev_params, batch)
        _, of_different = tracker.update(grads, tracked[0], params)
        _, of_same = tracker.update(grads, tracked[1], params, prev_params_grads=second)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), params, opt_state, (of_different, of_same)

    names = ("different batches", "same batch")
    records = {name: dm.planning.SmoothnessRecord() for name in names}
    carry = params, params, tx.init(params), (tracker.init(params), tracker.init(params))
    for batch in batches:
        carry = step(*carry, batch)
        for record, tracked in zip(records.values(), carry[-1], strict=True):
            record.append(tracked)
    return {name: record.samples() for name, record in records.items()}


def smoothness_of_layers(samples: Samples, layers: dm.Layers) -> dict[str, list[float]]:
    """By criterion: of each layer the largest of its leaves', or their sum.

    A leaf's is L⁰ + L¹‖g‖* of the line through its samples, at the median ‖g‖*. Leaves without
    samples, which take no steps in a norm, are left out.
    """
    fit = dm.planning.fit_smoothness(samples)
    of_layers: list[list[float]] = [[] for _ in layers.names]
    for leaf in layers.leaves:
        if leaf.path in fit.leaves:
            of = fit.leaves[leaf.path]
            of_layers[leaf.layers[0]].append(of.l0 + of.l1 * of.median_dual_norm)
    return {"max": [max(of) for of in of_layers], "sum": [sum(of) for of in of_layers]}


def measured_smoothness(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    layers: dm.Layers,
    batches: Iterable[Any],
    schedule: optax.Schedule,
) -> dict[str, list[float]]:
    """Of each layer, by criterion, along a run of Muon.

    The leaves that count are those that take Muon's steps, one kernel in each layer of a CNN:
    biases are Adam's, which has no norm.
    """
    of_muon = dm.planning.track_smoothness(dm.norms.spectral_norm("muon"))
    tracker = dm.chain_subtrees({"matrix": of_muon, "other": optax.identity()}, dm.matrix_labels)
    samples = sample_smoothness(loss, dm.muon(schedule), tracker, params, batches)
    return smoothness_of_layers(samples["same batch"], layers)


def predict(smoothness: Mapping[str, Sequence[float]], costs: Sequence[float]) -> dict[str, Any]:
    """Speed-ups over full steps by each criterion: of uniform depths and the best by each."""
    best = {of: dm.planning.optimal_depth(smoothness[of], costs, criterion=of) for of in CRITERIA}
    distributions = {"uniform": dm.uniform_depth()} | {f"best by {of}": best[of] for of in CRITERIA}
    return {
        name: {
            "probabilities": np.asarray(of.probabilities(0, len(costs)), float).tolist(),
            "speed_ups": {
                criterion: dm.planning.predicted_speed_up(
                    of, smoothness[criterion], costs, criterion=criterion
                )
                for criterion in CRITERIA
            },
        }
        for name, of in distributions.items()
    }


def plan(
    model: Any,
    images: Images,
    *,
    batch_size: int,
    num_steps: int,
    learning_rate: float,
    seed: int,
    costs: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Measures a network of images along a short run of Muon, and predicts.

    Args:
        model: With its layers in `layer_patterns()`.
        images: Of which the training images are used.
        batch_size: Of every step, measured and counted.
        num_steps: Of the run.
        learning_rate: Of Muon, falling linearly to 0.
        seed: Of initial parameters and batches.
        costs: Of a step at each depth, if they are known; otherwise its FLOPs are counted.
    """
    params = jax.jit(model.init)(jax.random.key(seed), images.train_images[:1])["params"]
    layers = dm.layers_by_path(params, model.layer_patterns())
    schedule = optax.linear_schedule(learning_rate, 0.0, num_steps)
    generator = np.random.default_rng(seed)
    order = [generator.permutation(len(images.train_labels))[:batch_size] for _ in range(num_steps)]
    batches = [(images.train_images[rows], images.train_labels[rows]) for rows in order]
    loss = functools.partial(cross_entropy, model)
    smoothness = measured_smoothness(loss, params, layers, batches, schedule)
    if costs is None:
        tx = dm.drop_muon(schedule, layers)
        step = dm.train_step(loss, tx, dm.DepthSampler(layers, dm.uniform_depth(), seed=0))
        opt_state = jax.eval_shape(tx.init, params)
        of_depths = dm.planning.depth_cost(step, layers, params, opt_state, batches[0]).tolist()
    else:
        of_depths = list(costs)
    return {
        "layers": list(layers.names),
        "smoothness": smoothness,
        "costs": of_depths,
        "distributions": predict(smoothness, of_depths),
    }
