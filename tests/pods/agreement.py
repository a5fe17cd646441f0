"""What processes draw, and the error where they would not draw the same."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

import dropmuon_jax as dm
from pods.train import SEED, STEPS, make_optimizer, make_sampler

STEP = 5
OTHER_SEED = SEED + (1 << 40)  # the same lower half


def draw(mesh: Mesh) -> list[list[int]]:
    """The depths of all steps of the "cnn", without a mesh and with one.

    Process 0 draws first by itself: that it comes to an end shows that a draw waits for nobody.
    """
    drawn = []
    for scope in (contextlib.nullcontext(), jax.set_mesh(mesh)):
        with scope:
            sampler = make_sampler("cnn")
            if jax.process_index() == 0:
                sampler.depth(0)
            sampler.check_processes(0)
            drawn.append([sampler.depth(step) for step in range(STEPS)])
    return drawn


def disagree(mesh: Mesh) -> dict[str, str]:
    """What `check_processes` says to processes of which the second differs in one thing.

    The first call of a `train_step` says it too.

    Without a mesh, and with one; after each all go on, so that none is left waiting.
    """
    is_second = jax.process_index() == 1
    layers = make_sampler("cnn").layers

    def sampler(
        seed: int = SEED, of: dm.Layers = layers, distribution: Any = None
    ) -> dm.DepthSampler:
        return dm.DepthSampler(of, distribution or dm.uniform_depth(), seed=seed)

    usual = sampler()
    cases = {
        "nothing": (usual, STEP),
        "seed": (sampler(OTHER_SEED) if is_second else usual, STEP),
        "step": (usual, STEP + is_second),
        "layers": (sampler(of=layers.group(2)) if is_second else usual, STEP),
        "distribution": (sampler(distribution=dm.full_depth()) if is_second else usual, STEP),
    }
    said = {}
    for name, (draws, step) in cases.items():
        said[name] = _said(draws.check_processes, step)
        with jax.set_mesh(mesh):
            said[f"{name}, on a mesh"] = _said(draws.check_processes, step)
    optimizer = make_optimizer(layers)
    step_fn = dm.train_step(lambda params: 0.0, optimizer, cases["seed"][0])
    said["seed, in a training step"] = _said(step_fn, STEP, None, None)
    return said


def _said(function: Callable[..., Any], *args: Any) -> str:
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return ""
