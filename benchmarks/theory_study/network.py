"""What the theory says of a network: measured smoothness and costs, and the best distributions.

The smoothness of a layer is that of its leaves that take Muon's steps: the largest of theirs for
"max" and their sum for "sum", as the bounds have it if every leaf counts. In the CNN that is one
kernel; its bias is Adam's, which has no norm, and left out. A leaf's is L⁰ + L¹‖g‖* of the line
that `dm.planning.fit_smoothness` puts through its samples, at the median ‖g‖*.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jaxtyping import Float

import dropmuon_jax as dm
from images import Images
from methods import cross_entropy
from theory_study.search import CRITERIA

MUON_NORM = dm.norms.spectral_norm("muon")  # of the steps of dm.muon


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of the layers, shallow to deep, and what follows from it."""

    layers: tuple[str, ...]
    smoothness: dict[str, Float[np.ndarray, " layers"]]
    """Of each criterion."""
    costs: Float[np.ndarray, " layers"]
    """Of a step at each depth: FLOPs, or what was given."""
    distributions: dict[str, dm.LayerDistribution]
    """Uniform depths, and the best by each criterion, "best by max"."""
    speed_ups: dict[str, dict[str, float]]
    """Predicted over full steps, by distribution and criterion."""
    fit: dm.planning.SmoothnessFit
    """Of each leaf that takes Muon's steps."""

    def probabilities(self) -> dict[str, list[float]]:
        """Of each depth, by distribution."""
        return {
            name: np.asarray(of.probabilities(0, len(self.layers)), float).tolist()
            for name, of in self.distributions.items()
        }


def plan(
    model: nn.Module,
    patterns: list[Any],
    images: Images,
    *,
    batch_size: int,
    num_steps: int,
    learning_rate: float,
    seed: int,
    costs: Sequence[float] | None = None,
) -> Plan:
    """Measures the network along a short run of Muon and in its compiled steps, and plans.

    Args:
        model: Of images.
        patterns: Its layers, shallow to deep.
        images: Of which the training images are used.
        batch_size: Of every step, measured and counted.
        num_steps: Of the run.
        learning_rate: Of Muon, falling linearly to 0.
        seed: Of initial parameters and batches.
        costs: Of a step at each depth, if they are known; otherwise its FLOPs are counted.
    """
    params = jax.jit(model.init)(jax.random.key(seed), images.train_images[:1])["params"]
    layers = dm.layers_by_path(params, patterns)
    schedule = optax.linear_schedule(learning_rate, 0.0, num_steps)
    batches = _batches(images, batch_size, num_steps, seed)
    fit = _measure(model, params, batches, schedule)
    if costs is None:
        of_depths = _count(model, params, layers, batches[0], schedule)
    else:
        of_depths = np.asarray(costs, float)
    smoothness = _of_layers(fit, layers)
    distributions = {"uniform": dm.uniform_depth()} | {
        f"best by {of}": dm.planning.optimal_depth(smoothness[of], of_depths, criterion=of)
        for of in CRITERIA
    }
    speed_ups = {
        name: {
            of: dm.planning.predicted_speed_up(
                distribution, smoothness[of], of_depths, criterion=of
            )
            for of in CRITERIA
        }
        for name, distribution in distributions.items()
    }
    return Plan(layers.names, smoothness, of_depths, distributions, speed_ups, fit)


def _batches(images: Images, batch_size: int, num_steps: int, seed: int) -> list[Any]:
    generator = np.random.default_rng(seed)
    batches = []
    for _ in range(num_steps):
        rows = generator.permutation(len(images.train_labels))[:batch_size]
        batches.append((images.train_images[rows], images.train_labels[rows]))
    return batches


def _measure(
    model: nn.Module, params: Any, batches: list[Any], schedule: optax.Schedule
) -> dm.planning.SmoothnessFit:
    """Along a run of Muon, from two gradients of the same batch."""
    tx = dm.muon(schedule)
    tracker = dm.chain_subtrees(
        {"matrix": dm.planning.track_smoothness(MUON_NORM), "other": optax.identity()},
        dm.matrix_labels,
    )
    gradient = jax.grad(functools.partial(cross_entropy, model))

    @jax.jit
    def step(params, prev_params, opt_state, tracked, batch):
        grads, prev_grads = gradient(params, batch), gradient(prev_params, batch)
        _, tracked = tracker.update(grads, tracked, params, prev_params_grads=prev_grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), params, opt_state, tracked

    prev_params, opt_state, tracked = params, tx.init(params), tracker.init(params)
    samples = dm.planning.SmoothnessRecord()
    for batch in batches:
        params, prev_params, opt_state, tracked = step(
            params, prev_params, opt_state, tracked, batch
        )
        samples.append(tracked)
    return dm.planning.fit_smoothness(samples)


def _count(
    model: nn.Module, params: Any, layers: dm.Layers, batch: Any, schedule: optax.Schedule
) -> Float[np.ndarray, " layers"]:
    """FLOPs of a step of Drop-Muon at each depth."""
    tx = dm.drop_muon(schedule, layers)

    @functools.partial(jax.jit, static_argnames="depth")
    def step(params, opt_state, batch, depth):
        mask = layers.mask(depth)
        loss, grads = dm.masked_value_and_grad(functools.partial(cross_entropy, model))(
            params, batch, layer_mask=mask
        )
        updates, opt_state = tx.update(grads, opt_state, params, layer_mask=mask)
        return optax.apply_updates(params, updates), opt_state, loss

    return dm.planning.depth_cost(step, layers, params, jax.eval_shape(tx.init, params), batch)


def _of_layers(
    fit: dm.planning.SmoothnessFit, layers: dm.Layers
) -> dict[str, Float[np.ndarray, " layers"]]:
    """Of each criterion."""
    leaves: list[list[float]] = [[] for _ in layers.names]
    for leaf in layers.leaves:
        if leaf.path in fit.leaves:
            of = fit.leaves[leaf.path]
            leaves[leaf.layers[0]].append(of.l0 + of.l1 * of.median_dual_norm)
    return {
        "max": np.array([max(of) for of in leaves]),
        "sum": np.array([sum(of) for of in leaves]),
    }
