"""Leaves where they stand: their paths, shapes and neighbours, and what was said of their axes."""

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import GetAttrKey
from optax.contrib import MuonDimensionNumbers

from dropmuon_jax.layers.by_path import match_leaves
from dropmuon_jax.layers.complex_leaves import paths_of_wholes
from dropmuon_jax.layers.dimension_numbers import (
    LAYOUTS,
    DimensionNumbers,
    Grouped,
    Layout,
    LeafNumbers,
    Parts,
    check_leaf_numbers,
)
from dropmuon_jax.layers.trees import leaf_paths, masked_paths

# Kernels of Equinox and PyTorch have these names and are (out, in, *window). Elsewhere a leaf of
# such a name may be (in, out).
NAMES_IN_DOUBT = ("weight", "weight_ih", "weight_hh")
KERNELS = {"kernel", "recurrent_kernel", "w", "w_i", "w_h", *NAMES_IN_DOUBT}


class Site(NamedTuple):
    """A leaf where it stands, and what was said of it."""

    path: str
    called: str
    """The path without the part of a complex leaf, with slashes for the dots of PyTorch: its words
    say what the leaf is."""
    shape: tuple[int, ...]
    numbers: MuonDimensionNumbers | Grouped | Layout | None
    """Its dimension numbers as a whole, if somebody has said them."""
    is_exact: bool
    """Whether they are its own, by a pattern or by its module, and not those of the whole tree."""
    beside: Mapping[str, tuple[int, ...] | None]
    """The leaves of its module by name: their shapes, or None for one in another chain."""
    module: str = ""
    """The type of its module, where the tree tells, and if so what the leaf is to it: "vector",
    "table" or "matrix"."""
    said: str = ""
    parts: Parts | None = None
    """The parts of an axis, if somebody has said them."""

    @property
    def named(self) -> str:
        """The leaf at the start of a message that asks for dimension numbers."""
        in_parts = " (of its dm.layers.Parts say it as of=…)" if self.parts else ""
        return f"Leaf '{self.path}' of shape {self.shape}{in_parts}"

    @property
    def name(self) -> str:
        """The last component of what it is called."""
        return self.called.rpartition("/")[2]

    @property
    def biases(self) -> list[list[int] | None]:
        """The sides of the biases beside a kernel, which are as long as it has channels out.

        None is for a bias of another chain, beside which the kernel was looked at before.
        """
        names = [name for name in ("bias", "b") if self.name in KERNELS and name in self.beside]
        shapes = [self.beside[name] for name in names]
        return [None if shape is None else [n for n in shape if n != 1] for shape in shapes]

    @property
    def window(self) -> tuple[int, ...]:
        """The sizes of a convolution's window, if it is one."""
        if isinstance(self.numbers, MuonDimensionNumbers):
            return ()
        return self.shape[2:] if self.layout == "out_in" else self.shape[:-2]

    @property
    def layout(self) -> str:
        """The order of the axes: one of `LAYOUTS`, or "axes" for numbers of axes."""
        if isinstance(self.numbers, Grouped):
            return self.numbers.layout
        return self.numbers or "in_out" if isinstance(self.numbers, str | None) else "axes"

    @property
    def is_unreadable(self) -> bool:
        """Whether the number of axes does not say which of them are fan-in and fan-out."""
        # (1, in, out) is the same matrix as a batch of one and as a window of one.
        by_shape = len(self.shape) in (2, 4) or set(self.shape[:-2]) == {1}
        return self.numbers is None and not by_shape

    @property
    def channels(self) -> tuple[int, int]:
        """The number of channels in and out of a leaf of two axes or more."""
        first, second = self.shape[:2] if self.layout == "out_in" else self.shape[-2:]
        return (second, first) if self.layout in ("out_in", "transposed") else (first, second)


class Cut(NamedTuple):
    """Where an axis is cut: into groups of equal size, and each of these into parts."""

    axis: int
    sizes: tuple[int, ...]
    """The sizes of the parts in each group."""
    groups: int = 1

    @property
    def batch_axis(self) -> int:
        """The axis of a part along which neighbours lie, behind the axis of groups if any."""
        return self.axis + (self.groups > 1)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The number and the size of neighbours of one size: they make one batch of matrices."""
        return [(len([*same]), size) for size, same in itertools.groupby(self.sizes)]


def cut_of(site: Site) -> Cut | None:
    """How an axis of a leaf is cut into parts; an error for parts that do not fit."""
    parts, shape = site.parts, site.shape
    if isinstance(site.numbers, Grouped):
        # Equal parts of the channels out.
        groups, axis = site.numbers.groups, 0 if site.layout == "out_in" else len(shape) - 1
        if shape[axis] % groups:
            raise ValueError(
                f"dimension_numbers: leaf '{site.path}' of shape {shape} has {shape[axis]} "
                f"channels out, which {groups} groups do not share equally."
            )
        return Cut(axis, (shape[axis] // groups,) * groups) if groups > 1 else None
    if parts is None:
        return None
    if not -len(shape) <= parts.axis < len(shape):
        raise ValueError(
            f"dimension_numbers: leaf '{site.path}' of shape {shape} has {len(shape)} axes, and "
            f"its dm.layers.Parts cut axis {parts.axis}. (Of stacked layers it is the axis of one "
            "layer.)"
        )
    size, total = shape[parts.axis], sum(parts.sizes) * parts.groups
    if total != size:
        raise ValueError(
            f"dimension_numbers: axis {parts.axis} of leaf '{site.path}' of shape {shape} has size "
            f"{size}, and its {parts} are {total}: dm.layers.Parts must fill the axis."
        )
    return Cut(parts.axis % len(shape), tuple(parts.sizes), parts.groups)


def sites_of(tree: Any, dimension_numbers: DimensionNumbers | None) -> list[Site]:
    """The leaves of a tree, in their order, with what dimension numbers and modules say of them.

    Raises:
        ValueError: For a pattern that matches no leaf, and a leaf that two patterns match.
    """
    paths, shapes = leaf_paths(tree), list(map(np.shape, jax.tree.leaves(tree)))
    elsewhere = masked_paths(tree)
    by_pattern = isinstance(dimension_numbers, Mapping)
    matches = {}
    if by_pattern:
        matches = match_leaves("dimension_numbers", dimension_numbers, paths, elsewhere)
    beside: dict[str, dict[str, tuple[int, ...] | None]] = {}
    # The dict of a model of PyTorch has paths with dots.
    wholes = [path.replace(".", "/") for path in paths_of_wholes(tree)]
    for path, shape in (*dict.fromkeys(elsewhere).items(), *zip(wholes, shapes, strict=True)):
        module, _, name = path.replace(".", "/").rpartition("/")
        beside.setdefault(module, {})[name] = shape
    sites = []
    of_leaves = zip(paths, wholes, shapes, _said(tree, shapes), strict=True)
    for path, called, shape, (module, said, known) in of_leaves:
        numbers = matches[path].value if path in matches else None
        is_exact = numbers is not None
        if numbers is None and not by_pattern:
            numbers = dimension_numbers
            is_exact = isinstance(numbers, MuonDimensionNumbers | Parts) or path == ""
            if len(shape) == 2 and (isinstance(numbers, Grouped) or numbers in LAYOUTS[2:]):
                numbers = None  # a layout of convolutions leaves matrices as they are
        if numbers is not None or path in matches:
            check_leaf_numbers(f"dimension_numbers of leaf '{path}'", numbers)
        parts = numbers if isinstance(numbers, Parts) else None
        whole: Any = numbers.of if isinstance(numbers, Parts) else numbers
        is_exact = is_exact and (path == "" or whole is not None)
        if known is not None and not is_exact:
            whole, is_exact = known, True
        near = beside[called.rpartition("/")[0]]
        sites.append(Site(path, called, shape, whole, is_exact, near, module, said, parts))
    return sites


def _said(
    tree: Any, shapes: Sequence[tuple[int, ...]]
) -> list[tuple[str, str, LeafNumbers | None]]:
    """What its module says of each leaf: the module's type, what it is, its layout if it has one.

    The modules of Equinox stay in the tree when their arrays are filtered, masked or replaced by
    shapes. The other libraries' trees have names only.
    """
    eqx: Any = sys.modules.get("equinox")
    if eqx is None:
        return [("", "", None)] * len(shapes)
    return [
        _equinox_says(eqx.nn, module, name, shape)
        for (module, name), shape in zip(_owners(eqx.Module, tree), shapes, strict=True)
    ]


def _owners(module_type: type, node: Any) -> Iterator[tuple[Any, str]]:
    """The nearest module around each leaf, in the order of the leaves, and its name there."""
    inside = jax.tree_util.tree_leaves_with_path(
        node, is_leaf=lambda child: child is not node and isinstance(child, module_type)
    )
    for path, child in inside:
        if isinstance(child, module_type) and child is not node:
            yield from _owners(module_type, child)
        else:
            yield node, path[0].name if path and isinstance(path[0], GetAttrKey) else ""


def _equinox_says(
    nn: Any, module: Any, name: str, shape: tuple[int, ...]
) -> tuple[str, str, LeafNumbers | None]:
    kind = type(module).__name__
    norms = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm, nn.PReLU)
    convolutions = (nn.Conv, nn.ConvTranspose)
    matrices = (nn.Linear, nn.LSTMCell, nn.GRUCell, *convolutions)
    if isinstance(module, norms) or (isinstance(module, nn.WeightNorm) and name == "g"):
        return kind, "vector", None
    if isinstance(module, nn.Embedding):
        return kind, "table", None
    if not isinstance(module, matrices):
        return "", "", None
    if not name.startswith("weight"):
        return kind, "vector", None
    groups = module.groups if isinstance(module, convolutions) else 1
    due = module.num_spatial_dims + 2 if isinstance(module, convolutions) else 2
    if len(shape) != due:  # several in one: no layout that they are known to have
        return kind, "matrix", None
    return kind, "matrix", "out_in" if groups == 1 else Grouped(groups, "out_in")
