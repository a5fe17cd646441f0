"""Leaves where they stand: their paths, shapes and neighbours, and what was said of their axes."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.tree_util import GetAttrKey
from optax.contrib import MuonDimensionNumbers

from dropmuon_jax._checks import check_choice, static_int
from dropmuon_jax.layers.by_path import match_leaves
from dropmuon_jax.layers.trees import leaf_paths, masked_paths

# "in_out" is (*window, in, out), as Flax, Haiku and Keras keep kernels, and "out_in" is
# (out, in, *window), as Equinox and PyTorch do. "transposed" is (*window, out, in), as Haiku and
# Keras keep transposed convolutions, and Flax with transpose_kernel=True. "depthwise" is
# (*window, 1, channels), as in Flax and Haiku, or (*window, channels, multiplier), as in Keras.
LAYOUTS = ("in_out", "out_in", "transposed", "depthwise")


class Grouped(NamedTuple):
    """Dimension numbers of a convolution in groups, whose channels out are split into them.

    Each group has a matrix of its own, with a shape factor of its own. A depthwise convolution
    whose channels out are more than those in has a group for each channel in.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"conv": {"kernel": jnp.ones((3, 3, 2, 8)).at[..., 4:].multiply(0.01)}}
        >>> tx = dm.newton_schulz_lmo(dimension_numbers={"conv": dm.layers.Grouped(2)})
        >>> step = tx.update(params, tx.init(params))[0]["conv"]["kernel"]
        >>> first, second = jnp.linalg.norm(step.reshape(18, 2, 4), axis=(0, 2))
        >>> print(jnp.isclose(first, second, rtol=1e-3))
        True
    """

    groups: int
    layout: Literal["in_out", "out_in"] = "in_out"


LeafNumbers = (
    MuonDimensionNumbers | Grouped | Literal["in_out", "out_in", "transposed", "depthwise"]
)
DimensionNumbers = LeafNumbers | Mapping[str, LeafNumbers]


class Site(NamedTuple):
    """A leaf where it stands, and what was said of it."""

    path: str
    shape: tuple[int, ...]
    numbers: LeafNumbers | None
    """Its dimension numbers, if somebody has said them."""
    is_exact: bool
    """Whether they are its own, by a pattern or by its module, and not those of the whole tree."""
    beside: Mapping[str, tuple[int, ...] | None]
    """The leaves of its module by name: their shapes, or None for one in another chain."""
    module: str = ""
    """The type of its module, where the tree tells, and if so what the leaf is to it: "vector",
    "table" or "matrix"."""
    said: str = ""

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


def check_dimension_numbers(dimension_numbers: Any) -> None:
    """Error unless the argument is dimension numbers, a mapping to them, or None."""
    if isinstance(dimension_numbers, Mapping | None):
        return
    if not isinstance(dimension_numbers, MuonDimensionNumbers | Grouped | str):
        raise TypeError(
            "dimension_numbers must be an optax.contrib.MuonDimensionNumbers, 'in_out', 'out_in', "
            f"or a mapping from path patterns to them, got {dimension_numbers!r}."
        )
    check_leaf_numbers("dimension_numbers", dimension_numbers)


def check_leaf_numbers(name: str, numbers: Any) -> None:
    """Error unless a value is dimension numbers of a leaf."""
    if isinstance(numbers, str):
        check_choice(name, numbers, LAYOUTS)
    elif isinstance(numbers, Grouped):
        static_int(f"{name}: groups", numbers.groups, minimum=1)
        check_choice(f"{name}: layout", numbers.layout, LAYOUTS[:2])
    elif not isinstance(numbers, MuonDimensionNumbers):
        raise TypeError(
            f"{name} must be an optax.contrib.MuonDimensionNumbers, 'in_out' or 'out_in', got "
            f"{numbers!r}."
        )


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
    for path, shape in (*dict.fromkeys(elsewhere).items(), *zip(paths, shapes, strict=True)):
        module, _, name = path.rpartition("/")
        beside.setdefault(module, {})[name] = shape
    sites = []
    for path, shape, (module, said, known) in zip(paths, shapes, _said(tree, shapes), strict=True):
        numbers = matches[path].value if path in matches else None
        is_exact = numbers is not None
        if numbers is None and not by_pattern:
            numbers = dimension_numbers
            is_exact = isinstance(numbers, MuonDimensionNumbers) or path == ""
            if len(shape) == 2 and not isinstance(numbers, MuonDimensionNumbers):
                # A layout of convolutions leaves matrices as they are.
                numbers = numbers if numbers in LAYOUTS[:2] else None
        if known is not None and not is_exact:
            numbers = numbers if numbers and len(shape) == 2 else known
            is_exact = True
        if numbers is not None:
            check_leaf_numbers(f"dimension_numbers of leaf '{path}'", numbers)
        neighbours = beside[path.rpartition("/")[0]]
        sites.append(Site(path, shape, numbers, is_exact, neighbours, module, said))
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
