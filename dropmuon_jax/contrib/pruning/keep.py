"""`keep_pruned`: an optimizer that leaves pruned weights at zero."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from dropmuon_jax._checks import check_parameters, check_transformation
from dropmuon_jax.contrib.pruning.masks import mask_of_leaves
from dropmuon_jax.transforms.masked import with_second_gradient


class KeepPrunedState(NamedTuple):
    """State of :func:`keep_pruned`."""

    masks: Any
    """A tree of the parameters with masks, and `optax.MaskedNode()` for leaves without."""
    inner: optax.OptState
    """The state of the optimizer."""


def keep_pruned(
    optimizer: optax.GradientTransformation, masks: Mapping[str, Array]
) -> optax.GradientTransformationExtraArgs:
    """Trains what is left: pruned weights become and stay zero under any optimizer, bit for bit.

    The optimizer sees zeros for the gradients of pruned weights, so that what it averages of them
    (momenta, second moments) is exactly zero; and where it moves them all the same, as Muon does,
    whose UVᵀ is dense, the update is replaced by what makes the weight zero.

    Args:
        optimizer: Any optimizer, as the outermost: what is done to its updates afterwards would
            move pruned weights again.
        masks: From the paths of leaves to masks, True where a weight is kept, such as
            :func:`make_masks` gives. Leaves without one are trained as ever.

    Returns:
        A transformation whose `update` needs `params` and passes extra arguments on, `layer_mask`
        and `depth` among them: a layer that is dropped moves only if its pruned weights are not
        zero yet. Its state is a :class:`KeepPrunedState`, so that masks are in every checkpoint.
        An optimizer's state from before the pruning has momenta of pruned weights; start with a
        new one.

    Raises:
        TypeError: If `optimizer` is no Optax transformation.
        ValueError: At `init`, for masks of other leaves or shapes, naming one; in `update`, without
            `params`.

    Examples:
        >>> import jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> params = {"w": jnp.array([[3.0, 0.0], [1.0, 2.0]])}
        >>> masks = {"w": jnp.array([[True, False], [True, True]])}
        >>> tx = dm.contrib.pruning.keep_pruned(dm.muon(0.1), masks)
        >>> state, grads = tx.init(params), {"w": jnp.ones((2, 2))}
        >>> updates, state = tx.update(grads, state, params)
        >>> print(optax.apply_updates(params, updates)["w"][0, 1])
        0.0

    References:
        Lee et al., *JaxPruner*, 2023, arXiv:2304.14082, wraps optimizers likewise; there a call
        after each step applies the masks to the parameters.
    """
    check_transformation("optimizer", optimizer)
    inner = optax.with_extra_args_support(optimizer)
    masks = dict(masks)

    def init(params: optax.Params) -> KeepPrunedState:
        check_parameters(params)
        of_leaves = mask_of_leaves(params, masks)
        # Copies, so that a step that donates its state does not delete the masks that were given.
        nodes = [optax.MaskedNode() if x is None else jnp.array(x, copy=True) for x in of_leaves]
        return KeepPrunedState(jax.tree.structure(params).unflatten(nodes), inner.init(params))

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, KeepPrunedState]:
        if params is None:
            raise ValueError(
                "keep_pruned makes pruned weights zero, from wherever they are: pass the "
                "parameters to update, tx.update(grads, opt_state, params)."
            )
        structure = jax.tree.structure(updates)
        of_leaves = jax.tree.leaves(state.masks, is_leaf=_has_no_mask)

        def where_kept(tree: Any, otherwise: list[Array]) -> Any:
            rows = zip(jax.tree.leaves(tree), of_leaves, otherwise, strict=True)
            return structure.unflatten(
                x if _has_no_mask(mask) else jnp.where(mask, x, other.astype(x.dtype))
                for x, mask, other in rows
            )

        zeros = list(map(jnp.zeros_like, jax.tree.leaves(updates)))
        extra_args = with_second_gradient(extra_args, updates)
        if extra_args.get("prev_params_grads") is not None:
            second = where_kept(extra_args["prev_params_grads"], zeros)
            extra_args = extra_args | {"prev_params_grads": second}
        steps, new = inner.update(where_kept(updates, zeros), state.inner, params, **extra_args)
        back = [-x for x in jax.tree.leaves(params)]
        return where_kept(steps, back), KeepPrunedState(state.masks, new)

    return optax.GradientTransformationExtraArgs(init, update)


def _has_no_mask(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
