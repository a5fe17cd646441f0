"""Masks, True where a weight is kept: from scores, on parameters, and around an optimizer."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Shaped, UInt

from dropmuon_jax._checks import (
    check_choice,
    check_parameters,
    check_transformation,
    describe,
    is_python_number,
    static_int,
)
from dropmuon_jax.contrib.pruning.kernels import Kernels, check_mapping
from dropmuon_jax.layers.trees import leaf_paths
from dropmuon_jax.transforms.masked import with_second_gradient

Group = Literal["output", "kernel", "all"]
Masks = dict[str, Array]


def make_masks(
    scores: Mapping[str, Array], kernels: Kernels, sparsity: float, *, per: Group = "output"
) -> Masks:
    """Prunes the weights with the lowest scores, the same part of each group.

    Args:
        scores: The scores of each kernel, by its path.
        kernels: What :func:`record_kernels` returned for them.
        sparsity: The part that is pruned, in [0, 1): of n weights that are compared the nearest
            whole number to sparsity · n, of equal ones the first.
        per: Which weights are compared: those of an "output", as in Wanda; those of a "kernel",
            where of stacked layers each has its own; or "all".

    Returns:
        A mapping from the paths to masks with the shapes of the leaves, True where a weight is
        kept.

    Raises:
        ValueError: For a sparsity or a group that there is not, and for scores of other kernels or
            shapes, naming one.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> pruning = dm.contrib.pruning
        >>> params = {"w": jnp.array([[1.0, 6.0], [2.0, 5.0], [3.0, 4.0], [0.0, 7.0]])}
        >>> kernels = pruning.record_kernels(lambda p, x: x @ p["w"], params, [jnp.ones((1, 4))])
        >>> scores = pruning.magnitude(params, kernels)
        >>> for per in ("output", "all"):
        ...     print(pruning.make_masks(scores, kernels, 0.5, per=per)["w"].sum(0))
        [2 2]
        [0 4]
    """
    if not is_python_number(sparsity) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be a number in [0, 1), got {describe(sparsity)}.")
    check_choice("per", per, get_args(Group))
    _check_scores(scores, kernels)
    if per == "all" and scores:
        flat = jnp.concatenate([scores[path].ravel() for path in scores])
        keep = _keep_highest(flat, round(sparsity * flat.size))
        ends = [0]
        for x in scores.values():
            ends.append(ends[-1] + x.size)
        spans = zip(scores.items(), ends, ends[1:], strict=False)
        return {path: keep[a:b].reshape(x.shape) for (path, x), a, b in spans}
    masks = {}
    for path, of_leaf in scores.items():
        stack, restore = kernels[path].matrices(of_leaf)
        groups = stack.mT if per == "output" else stack.reshape(len(stack), -1)
        keep = _keep_highest(groups, round(sparsity * groups.shape[-1]))
        masks[path] = restore(keep.mT if per == "output" else keep.reshape(stack.shape))
    return masks


def n_of_m_masks(scores: Mapping[str, Array], kernels: Kernels, n: int, m: int) -> Masks:
    """Keeps the n highest of every m neighbouring inputs of each output: 2:4 for n = 2, m = 4.

    Args:
        scores: The scores of each kernel, by its path.
        kernels: What :func:`record_kernels` returned for them.
        n: How many are kept, in [1, m].
        m: The size of a group, which must divide the fan-in of each kernel.

    Raises:
        TypeError: If n or m is no Python integer.
        ValueError: If they are out of range, or do not fit a kernel, naming it.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> pruning = dm.contrib.pruning
        >>> params = {"w": jnp.array([[1.0], [2.0], [3.0], [4.0]])}
        >>> kernels = pruning.record_kernels(lambda p, x: x @ p["w"], params, [jnp.ones((1, 4))])
        >>> scores = pruning.magnitude(params, kernels)
        >>> print(pruning.n_of_m_masks(scores, kernels, 1, 2)["w"].T)
        [[False True False True]]
    """
    static_int("n", n, minimum=1)
    if static_int("m", m, minimum=1) < n:
        raise ValueError(f"n must be at most m, got {n} of {m}.")
    _check_scores(scores, kernels)
    masks = {}
    for path, of_leaf in scores.items():
        stack, restore = kernels[path].matrices(of_leaf)
        batch, fan_in, fan_out = stack.shape
        if fan_in % m:
            raise ValueError(
                f"m is {m}, which does not divide the fan-in {fan_in} of '{path}'. Leave this "
                "kernel out of scores."
            )
        groups = stack.mT.reshape(batch, fan_out, fan_in // m, m)
        keep = _keep_highest(groups, m - n).reshape(batch, fan_out, fan_in)
        masks[path] = restore(keep.mT)
    return masks


def apply_masks(params: Any, masks: Mapping[str, Array]) -> Any:
    """The parameters with zeros where a mask is False.

    Raises:
        ValueError: For masks of other leaves or shapes than the parameters', naming one.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"w": jnp.array([3.0, 4.0]), "b": jnp.ones(1)}
        >>> pruned = dm.contrib.pruning.apply_masks(params, {"w": jnp.array([True, False])})
        >>> print(pruned["w"], pruned["b"])
        [3. 0.] [1.]
    """
    of_leaves = mask_of_leaves(params, masks)
    leaves, treedef = jax.tree.flatten(params)
    pairs = zip(leaves, of_leaves, strict=True)
    return treedef.unflatten(
        x if mask is None else jnp.where(mask, x, jnp.zeros_like(x)) for x, mask in pairs
    )


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
    masks = check_mapping("masks", masks)

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
        of_leaves = structure.flatten_up_to(state.masks)

        def where_kept(tree: Any, otherwise: list[Array]) -> Any:
            rows = zip(jax.tree.leaves(tree), of_leaves, otherwise, strict=True)
            return structure.unflatten(
                x if _has_no_mask(mask) else _chosen(mask, x, other) for x, mask, other in rows
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


def mask_of_leaves(params: Any, masks: Mapping[str, Array]) -> list[Array | None]:
    """The mask of each leaf, None for one without; an error for masks that do not fit."""
    paths, leaves = leaf_paths(params), jax.tree.leaves(params)
    shapes = dict(zip(paths, map(jnp.shape, leaves), strict=True))
    for path, mask in check_mapping("masks", masks).items():
        if path not in shapes:
            raise ValueError(f"masks have '{path}', which params do not: {sorted(shapes)[:6]}.")
        if jnp.shape(mask) != shapes[path] or mask.dtype != bool:
            raise ValueError(
                f"The mask of '{path}' is {mask.dtype.name}{list(mask.shape)}; it must be "
                f"bool{list(shapes[path])}, as the leaf."
            )
    return [masks.get(path) for path in paths]


@functools.partial(jax.jit, static_argnums=1)
def _keep_highest(
    scores: Float[Array, "*groups size"], num_pruned: int
) -> Bool[Array, "*groups size"]:
    """False for the lowest of the last axis, of equal ones the first, as a stable sort has it."""
    if num_pruned == 0:
        return jnp.ones_like(scores, bool)
    keys = _ordered_bits(scores.astype(np.promote_types(scores.dtype, np.float32)))
    num_bits = jnp.iinfo(keys.dtype).bits

    # The highest pruned key, bit by bit: far fewer operations than a sort.
    def with_next_bit(i: Array, threshold: Array) -> Array:
        bit = jnp.asarray(num_bits - 1 - i, keys.dtype)
        higher = threshold | (jnp.ones((), keys.dtype) << bit)
        count = jnp.sum(keys < higher, -1, keepdims=True, dtype=jnp.int32)
        return jnp.where(count < num_pruned, higher, threshold)

    threshold = jnp.zeros((*keys.shape[:-1], 1), keys.dtype)
    threshold = jax.lax.fori_loop(0, num_bits, with_next_bit, threshold)
    below, equal = keys < threshold, keys == threshold
    room = num_pruned - below.sum(-1, keepdims=True)
    return ~(below | (equal & (jnp.cumsum(equal, -1) <= room)))


def _ordered_bits(x: Float[Array, "*shape"]) -> UInt[Array, "*shape"]:
    """Integers in the order of the numbers, NaN above all."""
    num_bits = jnp.finfo(x.dtype).bits
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), f"uint{num_bits}")  # no -0
    sign = jnp.ones((), bits.dtype) << (num_bits - 1)
    bits = jnp.where(jnp.isnan(x), ~sign, bits)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _check_scores(scores: Mapping[str, Shaped[Array, "..."]], kernels: Kernels) -> None:
    for path, of_leaf in check_mapping("scores", scores).items():
        if path not in kernels:
            raise ValueError(f"scores have '{path}', which kernels do not: {list(kernels)[:6]}.")
        if of_leaf.shape != (expected := kernels[path].shape):
            raise ValueError(
                f"scores['{path}'] has shape {of_leaf.shape}, and the kernel {expected}."
            )


def _chosen(mask: Array, x: Array, other: Array) -> Array:
    """In the wider dtype: a weight is zero only behind its own negative, to the last bit."""
    wide = np.promote_types(np.promote_types(x.dtype, np.float32), other.dtype)
    dtype = x.dtype if x.dtype == other.dtype else wide
    return jnp.where(mask, x.astype(dtype), other.astype(dtype))


def _has_no_mask(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
