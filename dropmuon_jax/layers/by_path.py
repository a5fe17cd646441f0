"""Patterns over leaf paths, and layers from them."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np

from dropmuon_jax._checks import check_parameters, did_you_mean, static_int
from dropmuon_jax.layers.layers import Layers, make_layers
from dropmuon_jax.layers.rows import StackedLeaves
from dropmuon_jax.layers.trees import leaf_paths

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class StackedPatterns:
    """What :func:`stacked` makes: the patterns of leaves along one of whose axes lie layers."""

    patterns: tuple[str, ...]
    axis: int = 0


def stacked(*patterns: str, axis: int = 0) -> StackedPatterns:
    """Says of the leaves of patterns that they are stacked layers, for :func:`layers_by_path`.

    The leaves have an axis of one size L, and make L layers, row 0 the shallowest.
    :func:`scan_layers` runs them. It is the first axis where `jax.lax.scan`, `flax.linen.scan` and
    `jax.vmap` over inits have left it; others keep it elsewhere, as MaxText does its kernels
    (in, L, out) and scales (size, L). Sizes do not tell it. Whatever the axis, the steps of the
    layers are the same, and momenta have the shapes of their parameters.

    Args:
        *patterns: Patterns as :func:`layers_by_path` takes them, of one stack; several if it has
            several modules.
        axis: The axis of layers in every leaf, counted from its last one if negative.

    Returns:
        An entry of the patterns of :func:`layers_by_path`.

    Raises:
        TypeError: Without patterns, or for one that is no string; for an axis that is no integer.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"embed": jnp.zeros((9, 4)), "blocks": jnp.zeros((3, 4, 4))}
        >>> print(dm.layers_by_path(params, ["embed", dm.stacked("blocks")]))
        depth  layer      leaves  parameters   share
            0  embed           1          36   42.9%
            1  blocks[0]       1          16   19.0%
            2  blocks[1]       1          16   19.0%
            3  blocks[2]       1          16   19.0%
               total           2          84  100.0%
        'blocks' is 3 layers along axis 0 of its leaves.
        >>> params = {"wi": jnp.zeros((4, 3, 8)), "scale": jnp.zeros((4, 3))}
        >>> layers = dm.layers_by_path(params, [dm.stacked("wi", "scale", axis=1)])
        >>> layers.mask(2)["wi"]
        array([[False, False,  True]])
    """
    hint = "It is counted from 0, or from -1 for the last axis of each leaf."
    axis = static_int("axis", axis, minimum=-math.inf, hint=hint)
    return StackedPatterns(_members(patterns), axis)


def layers_by_path(
    params: Any, patterns: Sequence[str | Sequence[str] | StackedPatterns]
) -> Layers:
    """Groups parameter leaves into layers by patterns over their paths, shallow to deep.

    A leaf's path joins the keys that lead to it: `Conv_0/kernel`, `blocks/3/mlp/bias`. A pattern is
    a run of whole path components anywhere in the path, with `*` for any characters inside one
    component; a leading `/` ties it to the root. Every leaf must match exactly one pattern.

    Args:
        params: The parameters: any pytree (dicts, Flax Linen params, NNX states, NamedTuples,
            lists) of floating-point arrays or of `jax.ShapeDtypeStruct`s.
        patterns: One pattern for each layer, from the input to the output; a sequence of patterns
            for a layer made of several modules; and :func:`stacked` for layers that are stacked
            along an axis of their leaves.

    Returns:
        The :class:`Layers`. Print them once before a long run.

    Raises:
        TypeError: If `patterns` is a string or holds something else than strings; for a leaf of
            `params` that is no trainable floating-point parameter.
        ValueError: If a pattern matches no leaf, a leaf matches no pattern, or a leaf matches two;
            if a leaf of a stack lacks the axis of layers, or two differ in its size.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> dense = lambda n, m: {"kernel": jnp.zeros((n, m)), "bias": jnp.zeros(m)}
        >>> blocks = [dense(4, 4), dense(4, 4)]
        >>> params = {"embed": dense(9, 4), "blocks": blocks, "head": dense(4, 2)}
        >>> print(dm.layers_by_path(params, ["embed", "blocks/0", "blocks/1", "head"]))
        depth  layer     leaves  parameters   share
            0  embed          2          40   44.4%
            1  blocks/0       2          20   22.2%
            2  blocks/1       2          20   22.2%
            3  head           2          10   11.1%
               total          8          90  100.0%
    """
    if isinstance(patterns, str | Mapping | StackedPatterns) or not isinstance(patterns, Iterable):
        raise TypeError(
            f"patterns must be a sequence with a pattern for each layer, got {patterns!r}."
        )
    patterns = tuple(patterns)
    groups = _pattern_groups(patterns)
    check_parameters(params)
    paths = leaf_paths(params)
    group_of_leaf = _match_groups(groups, paths)
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(params)]
    names: list[str] = []
    stacks: list[StackedLeaves] = []
    layers_of_group: list[tuple[int, ...]] = []
    row_axes: dict[int, int] = {}
    for group, members in enumerate(groups):
        name, start, entry = " + ".join(members), len(names), patterns[group]
        if isinstance(entry, StackedPatterns):
            leaves = [leaf for leaf, of in enumerate(group_of_leaf) if of == group]
            num_layers, axes = _layers_along(entry.axis, name, leaves, paths, shapes)
            names += [f"{name}[{row}]" for row in range(num_layers)]
            layers, row_axes = tuple(range(start, len(names))), row_axes | axes
            stacks.append(StackedLeaves(name, tuple(leaves), layers, entry.axis))
        else:
            names.append(name)
            layers = (start,)
        layers_of_group.append(layers)
    places = [(layers_of_group[of], row_axes.get(leaf)) for leaf, of in enumerate(group_of_leaf)]
    return make_layers(params, names, places, stacks)


def _match_groups(groups: Sequence[Sequence[str]], paths: Sequence[str]) -> list[int]:
    """The group whose pattern matches each leaf."""
    matches: list[list[tuple[int, str]]] = [[] for _ in paths]
    for group, members in enumerate(groups):
        for pattern in members:
            expression = compile_pattern(pattern)
            found = [leaf for leaf, path in enumerate(paths) if expression.search(path)]
            if not found:
                raise ValueError(
                    f"Pattern '{pattern}' matches no leaf.{nearest_run(pattern, paths)} "
                    f"The leaves are:\n{_lines(paths)}"
                )
            for leaf in found:
                matches[leaf].append((group, pattern))
    unmatched = [path for path, hits in zip(paths, matches, strict=True) if not hits]
    if unmatched:
        raise ValueError(
            "No pattern matches these leaves; add a pattern for them, or a second one to the layer "
            f"they belong to, such as ('Dense_0', 'final_norm'):\n{_lines(unmatched)}"
        )
    for path, hits in zip(paths, matches, strict=True):
        if len(hits) > 1:
            raise ValueError(
                f"Leaf '{path}' matches both '{hits[0][1]}' and '{hits[1][1]}'; every leaf belongs "
                "to one layer. Write more components, or start a pattern with '/' to tie it to the "
                "root."
            )
    return [hits[0][0] for hits in matches]


def _layers_along(
    axis: int,
    name: str,
    leaves: Sequence[int],
    paths: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
) -> tuple[int, dict[int, int]]:
    """The number of layers of a stack, and their axis in each leaf; an error unless all agree."""
    first, axes, sizes = leaves[0], {}, {}
    for leaf in leaves:
        axes[leaf] = axis + len(shapes[leaf]) if axis < 0 else axis
        sizes[leaf] = dict(enumerate(shapes[leaf])).get(axes[leaf], 0)
        if not sizes[leaf] or sizes[leaf] != sizes[first]:
            other = f", and '{paths[leaf]}' {shapes[leaf]}" if leaf != first else ""
            raise ValueError(
                f"The leaves of the stack '{name}' need an axis {axis} of one size, an entry for "
                f"each layer: '{paths[first]}' has shape {shapes[first]}{other}. A leaf that is "
                "not stacked belongs to a layer of its own; leaves that are stacked along another "
                "axis say so, dm.stacked(…, axis=axis)."
            )
    return sizes[first], axes


def _pattern_groups(patterns: Sequence[Any]) -> list[tuple[str, ...]]:
    """One tuple of patterns for each layer or stack."""
    groups = []
    for group in patterns:
        if isinstance(group, StackedPatterns):
            groups.append(group.patterns)
        else:
            single = isinstance(group, str) or not isinstance(group, Sequence)
            groups.append(_members((group,) if single else group))
    if not groups:
        raise ValueError("patterns is empty; give one pattern for each layer, shallow to deep.")
    return groups


def _members(patterns: Sequence[Any]) -> tuple[str, ...]:
    """The patterns of one layer or stack."""
    if not patterns or not all(isinstance(p, str) and p.strip("/") for p in patterns):
        nested = any(isinstance(p, StackedPatterns) for p in patterns)
        raise TypeError(
            f"Each layer needs one or more nonempty string patterns, got {tuple(patterns)!r}."
            + (" dm.stacked(…) is an entry of its own." if nested else "")
        )
    return tuple(patterns)


def _lines(paths: Sequence[str], limit: int = 40) -> str:
    shown = "\n".join(f"  {path}" for path in paths[:limit])
    return shown + (f"\n  … ({len(paths)} in all)" if len(paths) > limit else "")


class Match(NamedTuple, Generic[T]):
    """The entry of a mapping from patterns that matches a leaf."""

    pattern: str
    value: T
    names_leaf: bool
    """Whether the pattern reaches to the end of the path; otherwise it names a module."""


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The expression that finds a pattern in a leaf path.

    A pattern is a run of whole path components, `*` stands for any characters inside one of them,
    and a leading `/` ties it to the root of the tree.

    >>> bool(compile_pattern("Conv_1").search("encoder/Conv_1/kernel"))
    True
    >>> bool(compile_pattern("Conv_1").search("encoder/Conv_10/kernel"))
    False
    >>> bool(compile_pattern("/Dense_0").search("Block_0/Dense_0/kernel"))
    False
    """
    anchored = pattern.startswith("/")
    body = re.escape(pattern.strip("/")).replace(r"\*", "[^/]*")
    return re.compile(("^" if anchored else "(?:^|/)") + body + "(?:/|$)")


def match_leaves(
    argument: str, mapping: Mapping[str, T], paths: Sequence[str], elsewhere: Sequence[str] = ()
) -> dict[str, Match[T]]:
    """The entry of a mapping from patterns for each leaf that one of them matches.

    Args:
        argument: The mapping's name in messages.
        mapping: From patterns to anything.
        paths: The paths of the leaves.
        elsewhere: Paths that a pattern may match instead.

    Raises:
        TypeError: For a pattern that is no string.
        ValueError: For a pattern that matches no leaf, and for a leaf that two patterns match.
    """
    matches: dict[str, Match[T]] = {}
    for pattern, value in mapping.items():
        if not isinstance(pattern, str) or not pattern.strip("/"):
            raise TypeError(f"{argument} is by path patterns, which are strings, got {pattern!r}.")
        expression = compile_pattern(pattern)
        hits = {path: found for path in paths if (found := expression.search(path))}
        if paths and not hits and not any(map(expression.search, elsewhere)):
            raise ValueError(
                f"{argument}: pattern '{pattern}' matches no leaf of {list(paths)}."
                f"{nearest_run(pattern, paths)}"
            )
        for path, found in hits.items():
            if path in matches:
                raise ValueError(
                    f"{argument}: leaf '{path}' matches both '{matches[path].pattern}' and "
                    f"'{pattern}'."
                )
            matches[path] = Match(pattern, value, found.end() == len(path))
    return matches


def nearest_run(pattern: str, paths: Sequence[str]) -> str:
    """A suggestion for a misspelt pattern, out of all runs of as many components.

    >>> nearest_run("blocks[0].attn", ["blocks/0/attn/kernel"])
    " Did you mean 'blocks/0/attn'?"
    """
    # As in Python: attributes and items.
    slashed = re.sub(r"[\[\]'\".]+", "/", pattern).strip("/")
    if slashed != pattern and slashed and any(map(compile_pattern(slashed).search, paths)):
        return did_you_mean(slashed, [slashed])
    width = len(pattern.strip("/").split("/"))
    runs = set()
    for path in paths:
        components = path.split("/")
        for i in range(len(components) - width + 1):
            runs.add("/".join(components[i : i + width]))
    return did_you_mean(pattern, sorted(runs))
