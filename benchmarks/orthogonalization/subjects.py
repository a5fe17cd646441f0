"""What is timed: lists of the matrices of networks, a grid of lists, and trees of parameters.

A matrix is a Flax kernel: (in, out), or (height, width, in, out), which is orthogonalized as a
matrix of height · width · in rows.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]


def _convolutions(channels: Sequence[int]) -> list[Shape]:
    """3 × 3 kernels from each number of channels to the next."""
    return [(3, 3, fan_in, fan_out) for fan_in, fan_out in itertools.pairwise(channels)]


def _resnet18() -> list[Shape]:
    """He et al., 2016, arXiv:1512.03385, for ImageNet: 20 convolutions, without the last layer."""
    shapes: list[Shape] = [(7, 7, 3, 64), *_convolutions([64] * 5)]
    for width in (128, 256, 512):
        shapes += _convolutions([width // 2, *[width] * 4])
        shapes.append((1, 1, width // 2, width))  # the projection of the shortcut
    return shapes


NETWORKS: dict[str, list[Shape]] = {
    # Radford et al., 2019, 124M: queries, keys and values in one matrix, attention's output, MLP.
    "gpt2": [(768, 2304), (768, 768), (768, 3072), (3072, 768)] * 12,
    "resnet18": _resnet18(),
    # The two CNNs of Drop-Muon, arXiv:2510.02239, without the last layer.
    "cnn_mnist": _convolutions([1, 64, 128, 256]),
    "cnn_cifar": _convolutions([3, 128, 256, 512]),
    "stack": [(512, 2048)] * 48,
    "small_200": [(64, 64)] * 200,
}
GROUPS: dict[str, list[str]] = {
    "networks": list(NETWORKS),
    "squares": [f"{side}x{side}" for side in (256, 512, 1024, 2048)],
    "small": [f"{side}x{side}{count}" for side in (16, 64) for count in ("", "x12", "x48")],
    # Stated before anything was measured on it: shorter sides by aspects by counts.
    "grid": [
        f"{side}x{aspect * side}{count}"
        for side in (16, 64, 256, 1024)
        for aspect in (1, 2, 4)
        for count in (("", "x12") if side < 1024 else ("",))
    ],
}


def groups_of(names: Sequence[str]) -> dict[str, list[str]]:
    """The lists of each group that is named, and as "own" those that are named one by one."""
    own = [name for name in names if name not in GROUPS]
    groups = {name: GROUPS[name] for name in names if name in GROUPS}
    return groups | ({"own": own} if own else {})


def shapes_of(name: str) -> list[Shape]:
    """The matrices of a group, a network, or what ROWSxCOLS[xCOUNT][+…] stands for."""
    if name in NETWORKS:
        return NETWORKS[name]
    if name in GROUPS:
        return [shape for member in GROUPS[name] for shape in shapes_of(member)]
    shapes: list[Shape] = []
    for text in name.split("+"):
        numbers = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:x([1-9]\d*))?", text)
        if not numbers:
            raise ValueError(
                "should be ROWSxCOLS or ROWSxCOLSxCOUNT, such as 768x3072x12+64x64x200, or of "
                + ", ".join([*GROUPS, *NETWORKS])
            )
        rows, cols, count = (int(number or 1) for number in numbers.groups())
        shapes += [(rows, cols)] * count
    return shapes


def tree_of(name: str) -> dict[str, dict[str, Shape]]:
    """The shapes of parameters: matrices, each with a bias and a scale, and the tables of GPT-2."""
    tree: dict[str, dict[str, Shape]] = {
        f"{'Conv' if len(shape) == 4 else 'Dense'}_{i}": {
            "kernel": shape,
            "bias": shape[-1:],
            "scale": shape[-1:],
        }
        for i, shape in enumerate(shapes_of(name))
    }
    tables = {"tokens": {"embedding": (50257, 768)}, "positions": {"embedding": (1024, 768)}}
    return tree | (tables if name == "gpt2" else {})


def make_arrays(shapes: Any, dtype: str) -> Any:
    """Normally distributed numbers in a tree of shapes, the same at every call."""
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(generator.standard_normal(shape, np.float32), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """Fan-in and fan-out."""
    return math.prod(shape[:-1]), shape[-1]


def needed_flops(shapes: Sequence[Shape], num_steps: int, degree: int = 5) -> int:
    """FLOPs of the products without which steps of degree 5 or 9 cannot be taken, of all matrices.

    For n × m, n ≤ m, on the Gram matrix, which the plain form never undercuts: R = XXᵀ; each step
    H = h(R) in one product or two, Q ← QH, R ← RHH, where the first Q is free and the last R not
    needed; at the end QX. All but the last are symmetric, and are counted in half.
    """
    sides = [sorted(matrix_shape(shape)) for shape in shapes]
    on_gram = ({5: 1, 9: 2}[degree] + 3) * num_steps - 3
    return sum(3 * n * n * m + on_gram * n**3 for n, m in sides)
