"""What processes draw, and what they hear when they would not draw the same."""

import contextlib
from typing import Any

import jax
from jax.sharding import Mesh

import dropmuon_jax as dm
from pods.train import SEED, STEPS, make_optimizer

STEP = 5
OTHER_SEED = SEED + (1 << 40)  # the same lower half


def draw(mesh: Mesh) -> list[list[int]]:
    """The depths of all steps of the "cnn", without a mesh and with one.

    Process 0 draws first by itself: that it comes to an end shows that a draw waits for nobody.
    """
    drawn = []
    for scope in (contextlib.nullcontext(), jax.set_mesh(mesh)):
        with scope:
            tx = make_optimizer("cnn")  # a new one, which remembers no draws
            if jax.process_index() == 0:
                tx.depth(0)
            tx.check_processes(0)
            drawn.append([tx.depth(step) for step in range(STEPS)])
    return drawn


def disagree(mesh: Mesh) -> dict[str, str]:
    """What `check_processes` says to processes of which the second is another one in one thing.

    Without a mesh, and with one; after each all go on, so that none is left waiting.
    """
    is_second = jax.process_index() == 1
    layers = make_optimizer("cnn").layers

    def sampler(
        seed: int = SEED, of: dm.Layers = layers, distribution: Any = None
    ) -> dm.LayerMaskSampler:
        return dm.layer_mask_sampler(of, distribution or dm.uniform_depth(), seed=seed)

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
        said[name] = _said(draws, step)
        with jax.set_mesh(mesh):
            said[f"{name}, on a mesh"] = _said(draws, step)
    return said


def _said(sampler: dm.LayerMaskSampler, step: int) -> str:
    try:
        sampler.check_processes(step)
    except ValueError as error:
        return str(error)
    return ""
