"""Which leaf is what: labels for `chain_subtrees`, from paths and shapes, by stated rules."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dropmuon_jax._layers import leaf_paths, match_leaves

_TABLES = {"embed", "embedding", "embeddings", "embedder", "emb", "wte", "wpe", "cls", "table"}
_HEADS = {"head", "classifier", "logits", "unembed", "unembedding"}
_MATRIX_ROLES = ("hidden", "head", "tied_head", "embedding")
ROLES = (*_MATRIX_ROLES, "bias")
# timm's eligibility rule for Muon (timm/optim/muon.py); beyond it a matrix looks like a table.
_MAX_ASPECT_RATIO = 128
# Of the square window of a convolution that is not called one; patch embeddings have 14 and 16.
_MAX_WINDOW = 16


def matrix_labels(params: Any) -> Any:
    """Labels for :func:`chain_subtrees`: "matrix" for what Muon is meant for, else "other".

    A leaf is "other" if it

    * has fewer than two axes,
    * is called `bias` or `scale`, of however many axes: the biases of attention heads and the
      norms of scanned layers are stacked vectors, or
    * has a word of a path component (`Embed_0`, `pos_embedding`, `tok_embeddings`) among `embed`,
      `embedding`, `embeddings`, `embedder`, `emb`, `wte`, `wpe`, `cls`, `table`, in upper or lower
      case: rows of a table are looked up or added, not multiplied.

    Everything else is "matrix". Print the labels once before a long run; to decide otherwise,
    change the returned tree or write your own.

    Args:
        params: The parameters: any pytree of arrays or of `jax.ShapeDtypeStruct`s.

    Returns:
        A tree of strings with the structure of the parameters.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> dm.matrix_labels({"Embed_0": jnp.zeros((9, 4)), "w": jnp.eye(4), "b": jnp.zeros(4)})
        {'Embed_0': 'other', 'b': 'other', 'w': 'matrix'}
    """

    def label(path: str, leaf: Any) -> str:
        return "other" if _is_vector(path, leaf) or _is_table(path) else "matrix"

    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(map(label, leaf_paths(params), leaves))


class Role(NamedTuple):
    """What a leaf is, and why."""

    path: str
    shape: tuple[int, ...]
    role: str
    reason: str


def role_labels(
    params: Any, roles: Mapping[str, str] | None = None, *, has_head: bool = True
) -> Any:
    """Labels for :func:`chain_subtrees`: what a leaf is in the network, which decides its norm.

    The first rule that fits a leaf counts:

    1. A pattern of `roles` matches its path: that role. (A pattern that names a module as hidden,
       head or embedding leaves its vectors, and what is called `bias` or `scale`, to rule 2; one
       that names the leaf itself does not.)
    2. It has fewer than two axes, or is called `bias` or `scale`: "bias".
    3. A word of its path (`Embed_0`, `tok_embeddings`) is among `embed`, `embedding`, `embeddings`,
       `embedder`, `emb`, `wte`, `wpe`, `cls`, `table`, in upper or lower case, it is not called
       `kernel`, and all but its last two axes have length 1: "embedding".
    4. A whole component of its path is among `head`, `classifier`, `logits`, `unembed`,
       `unembedding`, or ends with `_head` (`lm_head`, not `multi_head`): "head".
    5. It is ambiguous, which is an error: more than two axes with one channel in, which may be a
       depthwise convolution or the first of grey images; four axes without a square window up to
       16 and without `conv` in its path, which may be stacked attention; or a matrix that is not
       called `kernel` with one side more than 128 times the other, which looks like a table.
    6. "hidden".

    A network in which no leaf is a head is an error too: names such as `Dense_3` do not tell. A
    tied embedding, which is also the output layer, is told by `roles={"wte": "tied_head"}`. Print
    :func:`role_table` once before a long run.

    Args:
        params: The parameters: any pytree of arrays or of `jax.ShapeDtypeStruct`s.
        roles: From path patterns, as in :func:`layers_by_path`, to roles; "hidden", "head",
            "tied_head", "embedding", "bias" are known to :func:`scion` and :func:`gluon`, and you
            may add others.
        has_head: False for a network without one.

    Returns:
        A tree of strings with the structure of the parameters.

    Raises:
        ValueError: For an ambiguous leaf, naming it; without a head; for a pattern that matches no
            leaf, or two that match one.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"Embed_0": jnp.zeros((9, 4)), "Dense_0": jnp.eye(4), "Dense_1": jnp.eye(4)}
        >>> dm.role_labels(params, {"Dense_1": "head"})
        {'Dense_0': 'hidden', 'Dense_1': 'head', 'Embed_0': 'embedding'}

    References:
        The roles are Scion's (Pethick et al., 2025, arXiv:2502.07529), the rules for shapes
        those of timm (`timm/optim/muon.py`), which sends ambiguous leaves to AdamW instead.
    """
    assigned = _assign(params, roles or {}, has_head)
    return jax.tree.unflatten(jax.tree.structure(params), [leaf.role for leaf in assigned])


def role_table(
    params: Any, roles: Mapping[str, str] | None = None, *, has_head: bool = True
) -> str:
    """The labels of :func:`role_labels` as a table to print, with the rule that made each.

    Args:
        params: As in :func:`role_labels`.
        roles: Likewise.
        has_head: Likewise.

    Returns:
        A line for each leaf.

    Raises:
        ValueError: As :func:`role_labels`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"Dense_0": {"kernel": jnp.eye(4), "bias": jnp.ones(4)}, "head": jnp.eye(4)}
        >>> print(dm.role_table(params))
        leaf            shape  role    because
        Dense_0/bias    4      bias    vector
        Dense_0/kernel  4×4    hidden  matrix
        head            4×4    head    its path
    """
    rows = [("leaf", "shape", "role", "because")]
    for path, shape, role, reason in _assign(params, roles or {}, has_head):
        rows.append((path, "×".join(map(str, shape)) or "scalar", role, reason))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _assign(params: Any, roles: Mapping[str, str], has_head: bool) -> list[Role]:
    paths, leaves = leaf_paths(params), jax.tree.leaves(params)
    if not isinstance(roles, Mapping):
        raise TypeError(f"roles must be a mapping from path patterns to roles, got {roles!r}.")
    for pattern, role in roles.items():
        if not isinstance(role, str):
            raise TypeError(f"roles maps path patterns to role names, got {pattern!r}: {role!r}.")
    told = match_leaves("roles", roles, paths)
    assigned = []
    for path, leaf in zip(paths, leaves, strict=True):
        shape, match = tuple(np.shape(leaf)), told.get(path)
        of_module = match is not None and match.value in _MATRIX_ROLES and not match.names_leaf
        if match is None or (of_module and _is_vector(path, leaf)):
            role, reason = _role_by_rules(path, shape, leaf)
        else:
            role, reason = match.value, f"'{match.pattern}'"
        assigned.append(Role(path, shape, role, reason))
    # Without leaves, params is the placeholder of optax.tree.map_params.
    if has_head and paths and not any(leaf.role in ("head", "tied_head") for leaf in assigned):
        candidates = [
            leaf.path
            for leaf in assigned
            if leaf.role in ("hidden", "embedding") and len(leaf.shape) == 2
        ]
        raise ValueError(
            f"No leaf is the head, by its path ({', '.join(sorted(_HEADS))}, or *_head). Say which "
            f"of {candidates} it is: roles={{'…': 'head'}}, or 'tied_head' for an embedding that "
            "is the output layer too; or say has_head=False."
        )
    return assigned


def _role_by_rules(path: str, shape: tuple[int, ...], leaf: Any) -> tuple[str, str]:
    if _is_vector(path, leaf):
        return "bias", "vector" if len(shape) < 2 else "its name"
    name, window, lower = path.rsplit("/", 1)[-1], shape[:-2], path.lower()
    if _is_table(path) and name != "kernel" and set(window) <= {1}:
        return "embedding", "its path"
    if any(_is_head(component) for component in lower.split("/")):
        return "head", "its path"
    if math.prod(window) > 1 and shape[-2] == 1:
        raise ValueError(
            f"Leaf '{path}' of shape {shape} may be a depthwise convolution, whose channels no "
            "matrix norm may mix, or the first of grey images. Say which: "
            f"roles={{'{path}': 'hidden'}}, or a role of your own, such as 'depthwise', with "
            "lmos={'depthwise': dm.row_lmo(…)}."
        )
    square = len(set(window)) == 1 and window[0] <= _MAX_WINDOW
    if len(shape) == 4 and not square and "conv" not in lower:
        raise ValueError(
            f"Leaf '{path}' of shape {shape} may be a convolution with a window of "
            f"{window[0]}×{window[1]}, or a stack of attention or expert kernels. Say that it is "
            f"one, roles={{'{path}': 'hidden'}}, and of a stack the axes, in dimension_numbers."
        )
    extreme = len(shape) == 2 and max(shape) > _MAX_ASPECT_RATIO * min(shape)
    if extreme and name != "kernel":
        raise ValueError(
            f"Leaf '{path}' of shape {shape} looks like a table of embeddings, with one side more "
            f"than {_MAX_ASPECT_RATIO} times the other. Say what it is: roles={{'{path}': "
            "'embedding'}, or 'hidden' or 'head'."
        )
    if len(shape) == 2:
        return "hidden", "matrix"
    if len(shape) == 3 and "conv" not in lower and window != (1,):
        return "hidden", "3 axes: needs dimension_numbers"
    return "hidden", f"window {'×'.join(map(str, window))}" if square else f"{len(shape)} axes"


def _is_head(component: str) -> bool:
    return component in _HEADS or (component.endswith("_head") and component != "multi_head")


def _is_vector(path: str, leaf: Any) -> bool:
    return len(np.shape(leaf)) < 2 or path.rsplit("/", 1)[-1] in ("bias", "scale")


def _is_table(path: str) -> bool:
    return not set(re.split(r"[/_.]", path.lower())).isdisjoint(_TABLES)
