"""What a leaf is in the network, from its path and shape, by stated rules."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from optax.contrib import MuonDimensionNumbers

from dropmuon_jax._checks import did_you_mean
from dropmuon_jax.layers.by_path import match_leaves
from dropmuon_jax.layers.layers import format_table
from dropmuon_jax.layers.matrices import (
    NAMES_IN_DOUBT,
    DimensionNumbers,
    LeafNumbers,
    check_dimension_numbers,
    leaf_axes,
    needs_numbers,
    numbers_of_leaves,
)
from dropmuon_jax.layers.trees import leaf_paths

_MATRIX_ROLES = ("hidden", "head", "tied_head", "embedding")
ROLES = (*_MATRIX_ROLES, "bias")
_TABLES = {"embed", "embedding", "embeddings", "embedder", "emb", "wte", "wpe", "cls", "table"}
_HEADS = {"head", "classifier", "logits", "unembed", "unembedding"}
# Flax's, Haiku's and Keras's names of vectors, which some layers keep with more than one axis.
_VECTORS = {"bias", "scale", "offset", "beta", "gamma"}
# timm's eligibility rule for Muon (timm/optim/muon.py); beyond it a matrix looks like a table.
_MAX_ASPECT_RATIO = 128
# Of the square window of a convolution that is not called one; patch embeddings have 14 and 16.
_MAX_WINDOW = 16


@dataclasses.dataclass(frozen=True)
class Roles:
    """What a leaf is in the network, which decides its norm and whether Muon steps it.

    The first rule that fits a leaf counts:

    1. A pattern matches its path: that role. (A pattern that names a module as hidden, head or
       embedding leaves its vectors, by their name or their axes, to rule 2; one that names the leaf
       itself does not.)
    2. It has fewer than two axes, or is called `bias`, `scale`, `offset`, `beta` or `gamma`:
       "bias".
    3. A word of its path (`Embed_0`, `tok_embeddings`) is among `embed`, `embedding`, `embeddings`,
       `embedder`, `emb`, `wte`, `wpe`, `cls`, `table`, in upper or lower case, it is not called
       `kernel`, and all but its last two axes have length 1: "embedding". Of a leaf called
       `weight`, which may be a table or a kernel, only the name of its own module counts.
    4. A whole component of its path is among `head`, `classifier`, `logits`, `unembed`,
       `unembedding`, or ends with `_head` (`lm_head`, not `multi_head`): "head".
    5. It is ambiguous, which is an error: a convolution that is called `depthwise`, or one of
       several with one channel in (a single one is the first of grey images); a window not square,
       or larger than 16, without `conv` in the path, which may be stacked attention; a matrix that
       is not called `kernel` with one side more than 128 times the other, which looks like a table;
       a `weight` in a module of a module that is called after a table, or of an unknown layout.
    6. "hidden".

    A network in which no leaf is a head is an error too: names such as `Dense_3` do not say it. A
    tied embedding, which is also the output layer, is configured by `Roles({"wte": "tied_head"})`.

    Args:
        patterns: From path patterns, as :func:`layers_by_path` takes them, to roles; "hidden",
            "head", "tied_head", "embedding", "bias" are known to :func:`scion` and :func:`gluon`,
            and you may add others.
        has_head: False for a network without a head.

    Raises:
        TypeError: For patterns that are no mapping from strings to strings.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"Dense_0": {"kernel": jnp.eye(4), "bias": jnp.ones(4)}, "Dense_1": jnp.eye(4)}
        >>> print(dm.Roles({"Dense_1": "head"}).table(params))
        leaf            shape  role    because
        Dense_0/bias    4      bias    vector
        Dense_0/kernel  4×4    hidden  matrix
        Dense_1         4×4    head    'Dense_1'

    References:
        The roles are Scion's (Pethick et al., 2025, arXiv:2502.07529), the rules for shapes
        those of timm (`timm/optim/muon.py`), which sends ambiguous leaves to AdamW instead.
    """

    # Kept as sorted pairs, so that roles are hashable and equal by value.
    patterns: Mapping[str, str] | tuple[tuple[str, str], ...] = ()
    has_head: bool = True

    def __post_init__(self):
        if not isinstance(self.patterns, Mapping | tuple):
            raise TypeError(
                f"roles must be a mapping from path patterns to roles, got {self.patterns!r}."
            )
        for pattern, role in (patterns := dict(self.patterns)).items():
            if not isinstance(role, str) or not isinstance(pattern, str):
                raise TypeError(
                    f"roles maps path patterns to role names, got {pattern!r}: {role!r}."
                )
            if role not in ROLES and (slip := did_you_mean(role, ROLES)):
                raise ValueError(
                    f"roles gives '{pattern}' the role {role!r}.{slip} A role of your own needs "
                    "another name."
                )
        object.__setattr__(self, "patterns", tuple(sorted(patterns.items())))

    def labels(self, params: Any, dimension_numbers: DimensionNumbers | None = None) -> Any:
        """The role of each leaf: labels for :func:`chain_subtrees`.

        Args:
            params: The parameters: any pytree of arrays or of `jax.ShapeDtypeStruct`s.
            dimension_numbers: Those that the optimizer has, which say what is a window and what a
                channel. A string for the whole tree does not concern embeddings, which are
                (tokens, features) in all libraries.

        Returns:
            A tree of strings with the structure of the parameters.

        Raises:
            ValueError: For an ambiguous leaf, naming it; without a head; for a pattern that matches
                no leaf, or two that match one.
        """
        roles = [leaf.role for leaf in self._assign(params, dimension_numbers)]
        return jax.tree.structure(params).unflatten(roles)

    def table(self, params: Any, dimension_numbers: DimensionNumbers | None = None) -> str:
        """The roles as a table to print once before a long run, with the rule that made each.

        The arguments and errors are those of :meth:`labels`.
        """
        rows = [("leaf", "shape", "role", "because")]
        for path, shape, role, reason in self._assign(params, dimension_numbers):
            rows.append((path, "×".join(map(str, shape)) or "scalar", role, reason))
        return format_table(rows, "<<<<")

    def _assign(self, params: Any, dimension_numbers: DimensionNumbers | None) -> list["_LeafRole"]:
        paths, leaves = leaf_paths(params), jax.tree.leaves(params)
        check_dimension_numbers(dimension_numbers)
        numbers = numbers_of_leaves(dimension_numbers, paths)
        by_pattern = isinstance(dimension_numbers, Mapping)
        has_several = sum(map(_has_one_channel, map(np.shape, leaves), numbers)) > 1
        matches = match_leaves("roles", dict(self.patterns), paths)
        assigned = []
        for path, leaf, spec in zip(paths, leaves, numbers, strict=True):
            shape, match = tuple(np.shape(leaf)), matches.get(path)
            is_vector = len(shape) < 2 or path.rsplit("/", 1)[-1] in _VECTORS
            of_module = match is not None and match.value in _MATRIX_ROLES and not match.names_leaf
            if match is not None and not (of_module and is_vector):
                role, reason = match.value, f"'{match.pattern}'"
            elif is_vector:
                role, reason = "bias", "vector" if len(shape) < 2 else "its name"
            elif _is_table(path, shape):
                role, reason = "embedding", "its path"
            else:
                is_called_depthwise = len(shape) > 2 and "depthwise" in path.lower()
                if is_called_depthwise or (has_several and _has_one_channel(shape, spec)):
                    raise ValueError(_may_be_depthwise(path, shape))
                role, reason = _matrix_role(path, shape, spec, by_pattern)
            assigned.append(_LeafRole(path, shape, role, reason))
        # Without leaves, params is the placeholder of optax.tree.map_params.
        if self.has_head and paths and not any(x.role in ("head", "tied_head") for x in assigned):
            candidates = [
                leaf.path
                for leaf in assigned
                if leaf.role in ("hidden", "embedding") and len(leaf.shape) == 2
            ]
            raise ValueError(
                f"No leaf is the head, by its path ({', '.join(sorted(_HEADS))}, or *_head). Say "
                f"which of {candidates} it is: roles={{'…': 'head'}}, or 'tied_head' for an "
                "embedding that is the output layer too; or say roles=dm.Roles(has_head=False)."
            )
        return assigned


class _LeafRole(NamedTuple):
    """What a leaf is, and why."""

    path: str
    shape: tuple[int, ...]
    role: str
    reason: str


def as_roles(value: Roles | Mapping[str, str] | None) -> Roles:
    """The roles that a user has given, maybe as a mapping of patterns alone."""
    if isinstance(value, Roles):
        return value
    return Roles() if value is None else Roles(value)


def matrix_labels(
    params: Any,
    dimension_numbers: DimensionNumbers | None = None,
    roles: Roles | Mapping[str, str] | None = None,
) -> Any:
    """Labels for :func:`chain_subtrees`: "matrix" for what Muon is meant for, else "other".

    The hidden leaves and heads of :class:`Roles` are matrices. Vectors and tables, of which rows
    are looked up or added, not multiplied, are not, nor are leaves of roles of your own. Nothing
    needs to be a head. Print the labels once before a long run.

    Args:
        params: The parameters: any pytree of arrays or of `jax.ShapeDtypeStruct`s.
        dimension_numbers: Those that the LMO of the matrices has.
        roles: Roles where paths and shapes do not decide, or a mapping from path patterns to them.

    Returns:
        A tree of strings with the structure of the parameters.

    Raises:
        ValueError: For an ambiguous leaf, naming it.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> dm.matrix_labels({"Embed_0": jnp.zeros((9, 4)), "w": jnp.eye(4), "b": jnp.zeros(4)})
        {'Embed_0': 'other', 'b': 'other', 'w': 'matrix'}
    """
    labels = dataclasses.replace(as_roles(roles), has_head=False).labels(params, dimension_numbers)
    return jax.tree.map(lambda role: "matrix" if role in ("hidden", "head") else "other", labels)


def _words(path: str) -> set[str]:
    return set(re.split(r"[/_.]", path.lower()))


def _is_table(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a leaf is a table of embeddings by its path; an error if that is ambiguous."""
    *modules, name = path.split("/")
    if _words(path).isdisjoint(_TABLES) or name == "kernel" or not set(shape[:-2]) <= {1}:
        return False
    module = next((part for part in reversed(modules) if not part.isdigit()), "")
    if name in NAMES_IN_DOUBT and _words(module).isdisjoint(_TABLES):
        raise ValueError(
            f"Leaf '{path}' of shape {shape} may be a table of embeddings, or a matrix inside a "
            f"module that is called after one. Say which: roles={{'{path}': 'embedding'}}, or "
            "'hidden'."
        )
    return True


def _has_one_channel(shape: tuple[int, ...], numbers: LeafNumbers | None) -> bool:
    """Whether a leaf is a convolution with one channel in."""
    channel, window = (1, shape[2:]) if numbers == "out_in" else (-2, shape[:-2])
    return (
        math.prod(window) > 1
        and shape[channel] == 1
        and not isinstance(numbers, MuonDimensionNumbers)
    )


def _may_be_depthwise(path: str, shape: tuple[int, ...]) -> str:
    return (
        f"Leaf '{path}' of shape {shape} may be a depthwise convolution, whose channels no matrix "
        f"norm may mix, or the first of grey images. Say which: roles={{'{path}': 'hidden'}}, or a "
        "role of your own, such as 'depthwise', with norms={'depthwise': dm.norms.row_norm()}."
    )


def _matrix_role(
    path: str, shape: tuple[int, ...], numbers: LeafNumbers | None, by_pattern: bool
) -> tuple[str, str]:
    """The role of a leaf that is neither a vector nor a table, and why."""
    *_, name = components = path.lower().split("/")
    is_unreadable = numbers is None and needs_numbers(shape) and name not in NAMES_IN_DOUBT
    window: tuple[int, ...] = ()
    if not isinstance(numbers, MuonDimensionNumbers):
        axes = leaf_axes(path, shape, "in_out" if is_unreadable else numbers)
        window = tuple(shape[axis] for axis in axes.window)
    if any(c in _HEADS or (c.endswith("_head") and c != "multi_head") for c in components):
        return "head", "its path"
    is_square = len(set(window)) == 1 and max(window) <= _MAX_WINDOW
    # Three axes of a tree of one layout may as well be layers or heads, in and out.
    looks_like_window = is_square and not (len(shape) == 3 and isinstance(numbers, str))
    is_known = "conv" in path.lower() or (by_pattern and numbers is not None)
    if window and not (looks_like_window or is_known or is_unreadable):
        raise ValueError(
            f"Leaf '{path}' of shape {shape} may be a convolution with a window of "
            f"{'×'.join(map(str, window))}, or a stack of attention or expert kernels. Of a "
            f"convolution say roles={{'{path}': 'hidden'}}; of a stack say the axes, in "
            "dimension_numbers."
        )
    is_extreme = len(shape) == 2 and max(shape) > _MAX_ASPECT_RATIO * min(shape) > 0
    if is_extreme and name != "kernel":
        raise ValueError(
            f"Leaf '{path}' of shape {shape} looks like a table of embeddings, with one side more "
            f"than {_MAX_ASPECT_RATIO} times the other. Say what it is: roles={{'{path}': "
            "'embedding'}, or 'hidden' or 'head'."
        )
    if is_unreadable:
        return "hidden", f"{len(shape)} axes: needs dimension_numbers"
    if window:
        return "hidden", f"window {'×'.join(map(str, window))}"
    return "hidden", "matrix" if len(shape) == 2 else "its dimension_numbers"
