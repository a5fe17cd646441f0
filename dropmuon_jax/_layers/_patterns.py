"""Patterns over leaf paths."""

import re
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from dropmuon_jax._checks import did_you_mean

T = TypeVar("T")


class Match(NamedTuple, Generic[T]):
    """What a mapping from patterns says of a leaf."""

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
    """What a mapping from patterns says of each leaf, of those that a pattern matches.

    Args:
        argument: The mapping's name in messages.
        mapping: From patterns to anything.
        paths: Those of the leaves.
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
    """A suggestion for a misspelt pattern, out of all runs of as many components."""
    width = len(pattern.strip("/").split("/"))
    runs = set()
    for path in paths:
        components = path.split("/")
        for i in range(len(components) - width + 1):
            runs.add("/".join(components[i : i + width]))
    return did_you_mean(pattern, sorted(runs))
