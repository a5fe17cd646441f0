"""What a leaf is in the network, from its path and shape, by stated rules."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from dropmuon_jax._checks import check_parameters, did_you_mean
from dropmuon_jax.layers.by_path import match_leaves
from dropmuon_jax.layers.dimension_numbers import DimensionNumbers, check_dimension_numbers
from dropmuon_jax.layers.kinds import HEADS, check_axes, components, is_vector, kind_of
from dropmuon_jax.layers.layers import format_table
from dropmuon_jax.layers.sites import sites_of

_MATRIX_ROLES = ("hidden", "head", "tied_head", "embedding")
ROLES = (*_MATRIX_ROLES, "bias")


@dataclasses.dataclass(frozen=True)
class Roles:
    """What a leaf is in the network, which decides its norm and whether Muon steps it.

    Words of a path are parts of its components: `TokenEmbed_0` has the words `token` and `embed`. A
    component is called after its last word. The first rule that fits a leaf counts:

    1. A pattern matches its path: that role. (A pattern that names a module as hidden, head or
       embedding leaves its vectors, as rule 2 knows them, alone; one that names the leaf does not.)
    2. It is a vector, "bias": by having fewer than two axes; by a last word among `bias`, `scale`,
       `offset`, `beta`, `gamma`, `alpha`, `slope`; as the `b` beside a kernel `w`, or the `weight`
       of a norm.
    3. It is a table, "embedding": it, or the module of a `w` or `weight`, is called after `embed`,
       `embedding`, `embeddings`, `embedder`, `emb`, `embs`, `wte`, `wpe`, `cls`, `table`; or it has
       the word `pos` or ends with `token`. A leaf called `kernel` is none, nor one of which another
       axis than the last two is longer than 1.
    4. A component of its path is called after `head`, `classifier`, `logits`, `unembed`: "head".
    5. All its axes but one have length 1: "bias"; unless it is the `kernel`, `w` or `weight` of a
       module, or dimension numbers name it.
    6. "hidden".

    The modules of Equinox say what their leaves are, and the path is asked for heads only. What
    has two readings is an error that asks, whatever the leaf is called: a head in a path with words
    of tables or of attention; a `w` or `weight` in a module of a module that is called after a
    table; a `b` without a kernel beside it; a matrix that is not called `kernel` with one side more
    than 128 times the other; a tree in which no path has a word; and, of what is hidden or a head,
    an axis whose meaning is in doubt. That is so of a `weight` without a layout, of a kernel beside
    a bias as long as its fan-in in place of its fan-out, and of four axes unless the window is
    square, at most 16 wide, and the module is called a convolution (`conv`, `stem`, `patch_embed`,
    …). It is so of a convolution that may be transposed, depthwise or in groups: it is called so,
    its bias is not as long as its channels out, or it has one channel in and is not the first. LMOs
    refuse the same leaves; dimension numbers are the way out.

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
            if role in ("matrix", "muon"):
                raise ValueError(
                    f"roles gives '{pattern}' the role {role!r}, which as a role of your own would "
                    "go to the auxiliary optimizer. Matrices have the role 'hidden' or 'head'."
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
        check_parameters(params)
        check_dimension_numbers(dimension_numbers)
        sites = sites_of(params, dimension_numbers)
        matches = match_leaves("roles", dict(self.patterns), [site.path for site in sites])
        unnamed = [site.path for site in sites if len(site.shape) > 1 and site.path not in matches]
        if any(unnamed) and not any(components(site.path) for site in sites):
            raise ValueError(
                f"The leaves {unnamed} have no names that say what they are. Give a tree with "
                "names, of Keras {v.path: v.value for v in model.trainable_variables}; or say it "
                f"of each, roles={{'{unnamed[0]}': 'hidden'}}, or 'head', 'embedding' or 'bias'."
            )
        assigned, matrices = [], []
        for site in sites:
            match = matches.get(site.path)
            is_said = match and (match.names_leaf or match.value not in _MATRIX_ROLES)
            if not is_said and (vector := is_vector(site)):
                role, reason = "bias", vector
            elif match:
                role, reason = match.value, f"'{match.pattern}'"
            else:
                role, reason = kind_of(site)
            if role in ("hidden", "head"):
                matrices.append(site)
            assigned.append(_LeafRole(site.path, site.shape, role, reason))
        check_axes(matrices)
        # Without leaves, params is the placeholder of optax.tree.map_params.
        if self.has_head and sites and not any(x.role in ("head", "tied_head") for x in assigned):
            candidates = [
                leaf.path
                for leaf in assigned
                if leaf.role in ("hidden", "embedding") and len(leaf.shape) == 2
            ]
            raise ValueError(
                f"No leaf is the head, by its path ({HEADS}). Say "
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
