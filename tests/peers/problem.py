"""The parameters, gradients and rates in which every Muon takes its steps."""

import json
from pathlib import Path
from typing import Any

import numpy as np

TRAJECTORIES = Path(__file__).parent / "trajectories"
NUM_STEPS = 10
RECORDED = (1, 2, 5, 10)
WEIGHT_DECAY = 0.1
FIRST_RATE, LAST_RATE = 1.0, 0.2  # long steps, so that an error of 1e-5 is one of 1e-5 of a step

# As Flax keeps them. No side is shorter than 4, since timm sends such matrices to Adam.
SHAPES = {
    "embed/embedding": (7, 4),
    "conv/kernel": (2, 2, 3, 4),
    "attn/query/kernel": (4, 2, 3),
    "attn/query/bias": (2, 3),
    "attn/out/kernel": (2, 3, 4),
    "wide/kernel": (4, 7),
    "wide/bias": (7,),
    "tall/kernel": (8, 4),
    "square/kernel": (5, 5),
}


def rate(step: int) -> float:
    """A rate that falls linearly."""
    return FIRST_RATE + (LAST_RATE - FIRST_RATE) * step / NUM_STEPS


def _numbers(path: str, step: int) -> np.ndarray:
    """Numbers in [-1, 1] that look random and are the same on every machine."""
    at = np.arange(np.prod(SHAPES[path])) + 1
    x = np.sin(12.9898 * at + 78.233 * (list(SHAPES).index(path) + 1) + 37.719 * (step + 1))
    return (2 * (43758.5453 * x % 1) - 1).reshape(SHAPES[path])


def params() -> dict[str, np.ndarray]:
    """The first parameters by path."""
    return {path: _numbers(path, -2).astype(np.float32) for path in SHAPES}


def gradients(step: int) -> dict[str, np.ndarray]:
    """The gradients of a step: a part that stays, and a larger one that is new in each."""
    return {
        path: (0.5 * _numbers(path, -3) + _numbers(path, step)).astype(np.float32)
        for path in SHAPES
    }


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """From paths to a tree."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *modules, name = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = leaf
    return tree


def to_torch(path: str, x: np.ndarray) -> np.ndarray:
    """A leaf as PyTorch keeps it: (out, in, *window), and all heads of attention in one matrix."""
    if path == "conv/kernel":
        return x.transpose(3, 2, 0, 1)
    if path == "attn/query/kernel":
        return x.reshape(4, 6).T
    if path == "attn/query/bias":
        return x.reshape(6)
    if path == "attn/out/kernel":
        return x.reshape(6, 4).T
    return x.T if path.endswith("kernel") else x


def from_torch(path: str, x: np.ndarray) -> np.ndarray:
    """The way back from :func:`to_torch`."""
    if path == "conv/kernel":
        return x.transpose(2, 3, 1, 0)
    return (x.T if path.endswith("kernel") else x).reshape(SHAPES[path])


def load(name: str) -> dict[str, Any]:
    """What was recorded of a peer, with arrays by path after each recorded step."""
    record = json.loads((TRAJECTORIES / f"{name}.json").read_text())
    record["params"] = {
        int(step): {path: np.reshape(x, SHAPES[path]) for path, x in leaves.items()}
        for step, leaves in record["params"].items()
    }
    return record
