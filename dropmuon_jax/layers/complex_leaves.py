"""Complex leaves as pairs of real ones, which every optimizer and every mask can take."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dropmuon_jax.layers.trees import leaf_paths


class ComplexParts(NamedTuple):
    """A complex leaf as two real ones; Optax's `split_real_and_imaginary` names them so too."""

    real: Any
    imaginary: Any


def split_complex(tree: Any) -> Any:
    """The tree with a :class:`ComplexParts` in the place of each complex leaf; others stay.

    Optimizers and gradients of this package are of real leaves. Split the parameters once, before
    the layers are made, and join them in the loss: layers, masks, gradients, states and
    :func:`train_step` are then what they are of any other tree, patterns match the leaf as a whole,
    and both parts have the role of the leaf. The gradient of a real loss descends as it is, where
    that of a complex leaf is to be conjugated in JAX. (Of a complex matrix each part is then a
    matrix, stepped by its own polar factor; the polar factor of the complex matrix is another.)

    Args:
        tree: The parameters, or `jax.ShapeDtypeStruct`s of them.

    Returns:
        The tree; :func:`join_complex` goes back.

    Examples:
        >>> import jax, jax.numpy as jnp, dropmuon_jax as dm
        >>> stem = jax.lax.complex(jnp.eye(2), jnp.eye(2))
        >>> params = dm.layers.split_complex({"stem": stem, "head": jnp.eye(2)})
        >>> def loss_fn(params):
        ...     joined = dm.layers.join_complex(params)
        ...     return jnp.sum(jnp.abs(joined["stem"]) * joined["head"])
        >>> layers = dm.layers_by_path(params, ["stem", "head"])
        >>> optimizer = dm.drop_muon(0.1, layers)
        >>> grads = jax.grad(loss_fn)(params)
        >>> updates, _ = optimizer.update(grads, optimizer.init(params), params, depth=0)
        >>> print(dm.layers.join_complex(updates)["stem"].dtype == stem.dtype)
        True
    """

    def split(x: Any) -> Any:
        if not jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.complexfloating):
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return ComplexParts(*jax.eval_shape(lambda x: (x.real, x.imag), x))
        return ComplexParts(jnp.real(x), jnp.imag(x))

    return jax.tree.map(split, tree)


def join_complex(tree: Any) -> Any:
    """The tree with the complex leaves that :func:`split_complex` has split, complex64 at least."""

    def join(node: Any) -> Any:
        if not _is_split(node):
            return node
        wide = jnp.promote_types(jnp.result_type(*node), jnp.float32)
        return jax.lax.complex(*(jnp.asarray(x, wide) for x in node))

    return jax.tree.map(join, tree, is_leaf=_is_split)


def paths_of_wholes(tree: Any) -> list[str]:
    """The path of each leaf; of both parts of a complex one that of the leaf itself."""
    nodes = jax.tree.leaves(tree, is_leaf=_is_split)
    paths = leaf_paths(jax.tree.map(lambda _: 0, tree, is_leaf=_is_split))
    pairs = zip(paths, nodes, strict=True)
    return [path for path, node in pairs for _ in jax.tree.leaves(node)]


def refuse_split_by_optax(params: Any) -> None:
    """Error for leaves split around an optimizer that needs a mask, which is then lost."""
    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_split):
        if _is_split(node) and not isinstance(node, ComplexParts):
            at = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"Leaf '{at}' was split by optax.contrib.split_real_and_imaginary, which passes "
                "neither layer_mask nor depth on. Split the parameters themselves: params = "
                "dm.layers.split_complex(params), and dm.layers.join_complex(params) in the loss."
            )


def _is_split(node: Any) -> bool:
    """Whether a node is a split leaf; Optax's own has the same fields."""
    return getattr(type(node), "_fields", ()) == ComplexParts._fields
