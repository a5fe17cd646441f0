"""`layers_by_path`: layers from patterns over leaf paths."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dropmuon_jax._layers._layers import Layers, Stack, make_layers
from dropmuon_jax._layers._paths import leaf_paths
from dropmuon_jax._layers._patterns import compile_pattern, nearest_run


@dataclasses.dataclass(frozen=True)
class StackedPatterns:
    """What :func:`stacked` makes: the patterns of leaves that are stacked layers."""

    patterns: tuple[str, ...]


def stacked(*patterns: str) -> StackedPatterns:
    """Says of the leaves of patterns that they are stacked layers, for :func:`layers_by_path`.

    The leaves have a leading axis of one size L, as `jax.lax.scan`, `flax.linen.scan` and
    `jax.vmap` over inits leave it, and make L layers, row 0 the shallowest. :func:`scan_layers`
    runs them.

    Args:
        *patterns: As in :func:`layers_by_path`, of one stack; several if it has several modules.

    Returns:
        An entry of the patterns of :func:`layers_by_path`.

    Raises:
        TypeError: Without patterns, or for one that is no string.

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
    """
    return StackedPatterns(_members(patterns))


def layers_by_path(
    params: Any, patterns: Sequence[str | Sequence[str] | StackedPatterns]
) -> Layers:
    """Groups parameter leaves into layers by patterns over their paths, shallow to deep.

    A leaf's path joins the keys that lead to it: `Conv_0/kernel`, `blocks/3/mlp/bias`. A pattern is
    a run of whole path components anywhere in the path, with `*` for any characters inside one
    component; a leading `/` ties it to the root. Every leaf must match exactly one pattern.

    Args:
        params: The parameters: any pytree (dicts, Flax Linen params, NNX states, NamedTuples,
            lists) of arrays or of `jax.ShapeDtypeStruct`s.
        patterns: One pattern for each layer, from the input to the output; a sequence of patterns
            for a layer made of several modules; and :func:`stacked` for layers that are the rows of
            their leaves.

    Returns:
        The :class:`Layers`.

    Raises:
        TypeError: If `patterns` is a string or holds something else than strings.
        ValueError: If a pattern matches no leaf, a leaf matches no pattern, or a leaf matches two;
            if the leaves of a stack differ in their leading size.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> dense = lambda n, m: {"kernel": jnp.zeros((n, m)), "bias": jnp.zeros(m)}
        >>> blocks = [dense(4, 4), dense(4, 4)]
        >>> params = {"embed": dense(9, 4), "blocks": blocks, "head": dense(4, 2)}
        >>> print(dm.layers_by_path(params, ["embed", "blocks/0", "blocks/1", "head"]))
        depth  layer     leaves  parameters  share
            0  embed          2          40  44.4%
            1  blocks/0       2          20  22.2%
            2  blocks/1       2          20  22.2%
            3  head           2          10  11.1%
               total          8          90  100.0%
    """
    groups = _pattern_groups(patterns)
    paths = leaf_paths(params)
    matches: list[list[tuple[int, str]]] = [[] for _ in paths]
    for layer, group in enumerate(groups):
        for pattern in group:
            expression = compile_pattern(pattern)
            found = [leaf for leaf, path in enumerate(paths) if expression.search(path)]
            if not found:
                raise ValueError(
                    f"Pattern '{pattern}' matches no leaf.{nearest_run(pattern, paths)} "
                    f"The leaves are:\n{_lines(paths)}"
                )
            for leaf in found:
                matches[leaf].append((layer, pattern))

    unmatched = [path for path, hits in zip(paths, matches, strict=True) if not hits]
    if unmatched:
        raise ValueError(
            "No pattern matches these leaves; add a pattern for them, or a second one to the layer "
            f"they belong to, such as ('Dense_0', 'final_norm'):\n{_lines(unmatched)}"
        )
    for path, hits in zip(paths, matches, strict=True):
        if len(hits) > 1:
            first, second = hits[0][1], hits[1][1]
            raise ValueError(
                f"Leaf '{path}' matches both '{first}' and '{second}'; every leaf belongs to one "
                "layer. Write more components, or start a pattern with '/' to tie it to the root."
            )
    group_of_leaf = [hits[0][0] for hits in matches]
    names, first_layer, stacks = [], [], []
    for group, members in enumerate(groups):
        first_layer.append(len(names))
        name = " + ".join(members)
        if not isinstance(patterns[group], StackedPatterns):
            names.append(name)
            continue
        leaves = tuple(leaf for leaf, of in enumerate(group_of_leaf) if of == group)
        num_rows = _leading_size(name, params, paths, leaves)
        stacks.append(Stack(name, leaves, tuple(range(len(names), len(names) + num_rows))))
        names += [f"{name}[{row}]" for row in range(num_rows)]
    return make_layers(
        params,
        names=names,
        layer_of_leaf=[first_layer[group] for group in group_of_leaf],
        stacks=stacks,
    )


def _leading_size(name: str, params: Any, paths: Sequence[str], leaves: Sequence[int]) -> int:
    """The number of layers of a stack; an error unless its leaves agree."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(params)]
    for leaf in leaves:
        if not shapes[leaf] or shapes[leaf][0] != (*shapes[leaves[0]], 0)[0] or not shapes[leaf][0]:
            raise ValueError(
                f"The leaves of the stack '{name}' need a leading axis of one size, a row for each "
                f"layer: '{paths[leaves[0]]}' has shape {shapes[leaves[0]]}, and '{paths[leaf]}' "
                f"{shapes[leaf]}. A leaf that is not stacked belongs to a layer of its own."
            )
    return shapes[leaves[0]][0]


def _pattern_groups(patterns: Sequence[Any]) -> list[tuple[str, ...]]:
    """One tuple of patterns for each layer or stack."""
    if isinstance(patterns, str | StackedPatterns):
        raise TypeError(
            f"patterns must be a sequence with a pattern for each layer, got {patterns!r}."
        )
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
