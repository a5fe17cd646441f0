"""`layers_by_path`: layers from patterns over leaf paths."""

from collections.abc import Sequence
from typing import Any

from dropmuon_jax._layers._layers import Layers, make_layers
from dropmuon_jax._layers._paths import leaf_paths
from dropmuon_jax._layers._patterns import compile_pattern, nearest_run


def layers_by_path(params: Any, patterns: Sequence[str | Sequence[str]]) -> Layers:
    """Groups parameter leaves into layers by patterns over their paths, shallow to deep.

    A leaf's path joins the keys that lead to it: `Conv_0/kernel`, `blocks/3/mlp/bias`. A pattern is
    a run of whole path components anywhere in the path, with `*` for any characters inside one
    component; a leading `/` ties it to the root. Every leaf must match exactly one pattern.

    Args:
        params: The parameters: any pytree (dicts, Flax Linen params, NNX states, NamedTuples,
            lists) of arrays or of `jax.ShapeDtypeStruct`s.
        patterns: One pattern for each layer, from the input to the output, or a sequence of
            patterns for a layer made of several modules.

    Returns:
        The :class:`Layers`.

    Raises:
        TypeError: If `patterns` is a string or holds something else than strings.
        ValueError: If a pattern matches no leaf, a leaf matches no pattern, or a leaf matches two.

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
    return make_layers(
        params,
        names=[" + ".join(group) for group in groups],
        layer_of_leaf=[hits[0][0] for hits in matches],
    )


def _pattern_groups(patterns: Sequence[str | Sequence[str]]) -> list[tuple[str, ...]]:
    """One tuple of patterns for each layer."""
    if isinstance(patterns, str):
        raise TypeError(
            f"patterns must be a sequence with a pattern for each layer, got {patterns!r}."
        )
    groups = []
    for group in patterns:
        members = (group,) if isinstance(group, str) or not isinstance(group, Sequence) else group
        if not members or not all(isinstance(p, str) and p.strip("/") for p in members):
            raise TypeError(
                f"Each layer needs one or more nonempty string patterns, got {group!r}."
            )
        groups.append(tuple(members))
    if not groups:
        raise ValueError("patterns is empty; give one pattern for each layer, shallow to deep.")
    return groups


def _lines(paths: Sequence[str], limit: int = 40) -> str:
    shown = "\n".join(f"  {path}" for path in paths[:limit])
    return shown + (f"\n  … ({len(paths)} in all)" if len(paths) > limit else "")
