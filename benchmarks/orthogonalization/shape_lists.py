"""Lists of the matrices and convolution kernels that real networks have, one shape for each leaf.

A leaf is a Flax kernel: (in, out), or (height, width, in, out), which is orthogonalized as a matrix
of height · width · in rows.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]
ListName = Literal["gpt2", "resnet18", "cnn_mnist", "cnn_cifar", "stack", "small"]


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


SHAPE_LISTS: dict[ListName, list[Shape]] = {
    # Radford et al., 2019, 124M: queries, keys and values in one matrix, attention's output, MLP.
    "gpt2": [(768, 2304), (768, 768), (768, 3072), (3072, 768)] * 12,
    "resnet18": _resnet18(),
    # The two CNNs of Drop-Muon, arXiv:2510.02239, without the last layer.
    "cnn_mnist": _convolutions([1, 64, 128, 256]),
    "cnn_cifar": _convolutions([3, 128, 256, 512]),
    "stack": [(512, 2048)] * 48,
    "small": [(64, 64)] * 200,
}
LIST_NAMES: tuple[ListName, ...] = tuple(SHAPE_LISTS)
LARGE_LISTS = ("gpt2", "stack")  # where products should run at the machine's full rate


def parse_shape(text: str) -> list[tuple[int, int]]:
    """The leaves that ROWSxCOLS or ROWSxCOLSxCOUNT stands for.

    Raises:
        ValueError: If it is neither.
    """
    numbers = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?", text)
    rows, cols, count = (int(number or 1) for number in numbers.groups()) if numbers else (0, 0, 0)
    if min(rows, cols, count) < 1:
        raise ValueError(f"{text!r} is not ROWSxCOLS or ROWSxCOLSxCOUNT, such as 768x3072x12")
    return [(rows, cols)] * count


def matrix_shape(leaf: Shape) -> tuple[int, int]:
    """Fan-in and fan-out."""
    return math.prod(leaf[:-1]), leaf[-1]


def make_leaves(shapes: Sequence[Shape], dtype: str) -> list[jax.Array]:
    """Normally distributed updates, the same at every call."""
    generator = np.random.default_rng(0)
    return [jnp.asarray(generator.standard_normal(shape, np.float32), dtype) for shape in shapes]
