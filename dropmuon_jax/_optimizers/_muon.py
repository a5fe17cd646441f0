"""Muon, and Drop-Muon."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from dropmuon_jax._checks import check_nonnegative, is_python_number
from dropmuon_jax._labels import matrix_labels
from dropmuon_jax._layers import Layers
from dropmuon_jax._lmo import newton_schulz_lmo
from dropmuon_jax._momentum import keep_prev_params, keeps_prev_params
from dropmuon_jax._momentum import momentum as _momentum
from dropmuon_jax._optimizers._composition import (
    check_direction,
    check_rate,
    every_layer,
    row_by_row,
)
from dropmuon_jax._sampling import (
    AdaptiveDistribution,
    LayerDistribution,
    LayerMaskSampler,
    layer_mask_sampler,
)
from dropmuon_jax._subtrees import chain_subtrees, per_layer


def drop_muon(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    depth_distribution: LayerDistribution | AdaptiveDistribution,
    *,
    seed: int,
    steps_per_draw: int | None = None,
    momentum: optax.GradientTransformation | None = None,
    lmo: optax.GradientTransformation | None = None,
    weight_decay: float = 0.0,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
    labels: Any | Callable[[Any], Any] | None = None,
) -> LayerMaskSampler:
    r"""Drop-Muon: in each step, a Muon step of the layers from a random depth to the output.

    The matrices of each active layer i step by

    .. math::
        M_i &\leftarrow \text{decay}\, M_i + (1 - \text{decay})\, \nabla_i f(X; \xi) \\
        X_i &\leftarrow X_i - \gamma_k
        \max(1, \tfrac{\text{fan-out}}{\text{fan-in}})^{1/2}\, UV^\top(M_i)

    and inactive layers stay bit for bit what they are, momentum and counts included. Everything
    that is no matrix (biases, norm scales, embeddings) goes to an auxiliary optimizer, frozen layer
    by layer in the same way. The optimizer saves its own work on inactive layers; take the
    gradients with :func:`masked_value_and_grad` and the same mask to save the backward pass.

    Layers that are stacked (:func:`stacked`, :func:`scan_layers`) step row by row, and the depth
    may be traced: everything inside is then in :func:`per_layer`, and axes and labels are those of
    one layer, without the leading axis.

    It is `optax.chain` of :func:`chain_subtrees` and :func:`layer_mask_sampler`; write the chain
    yourself for more than these arguments. Wrappers go around it, such as clipping before it; their
    result gets the draws back by `tx.attach_to`. (With :func:`mvr_momentum` clip both gradients by
    one factor before `update`.)

    Args:
        learning_rate: The radius γ of a step, or a schedule of it over all steps.
        layers: The layers, over the whole parameters.
        depth_distribution: What is drawn in each step, such as :func:`uniform_depth`, or
            :func:`time_aware_depth`, whose draws need the state, `depth(step, opt_state)`.
        seed: Seed of the draws, a Python integer.
        steps_per_draw: How many steps in a row share a draw, by default 1.
        momentum: The momentum of the matrices, by default `momentum(decay=0.9)`. With
            :func:`mvr_momentum` the previous parameters of everything else are kept too.
        lmo: The LMO of the matrices, by default `newton_schulz_lmo(shape_factor="muon")`.
        weight_decay: Decoupled weight decay of the active matrices: X loses γ · weight_decay · X.
        auxiliary: The direction for everything else, by default `optax.scale_by_adam()`; for AdamW
            chain it with `optax.add_decayed_weights`. Not `optax.adamw(…)`, which has a learning
            rate, and its minus sign, already.
        auxiliary_learning_rate: Its learning rate, by default `learning_rate`.
        labels: A tree, or a function of the parameters (:meth:`Layers.row_shapes` of them, where
            layers are stacked), that labels each leaf "matrix" or "other", by default
            :func:`matrix_labels`.

    Returns:
        A :class:`LayerMaskSampler`: a transformation whose `update` requires the extra argument
        `layer_mask`, with `depth(step)` for the host and `sample(count)` for the device.

    Raises:
        TypeError: If `seed` is missing; in `update`, if `layer_mask` is missing.
        ValueError: For bad numbers, and for an `auxiliary`, `lmo` or `momentum` that descends by
            itself; at `init`, for a leaf in no layer, or labelled "matrix" that is none.

    Examples:
        >>> import jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> params = {"stem": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
        ...           "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
        >>> layers = dm.layers_by_path(params, ["stem", "head"])
        >>> tx = dm.drop_muon(0.1, layers, dm.uniform_depth(), seed=0)
        >>> updates, state = tx.update(params, tx.init(params), params, layer_mask=layers.mask(1))
        >>> print(updates["stem"]["bias"], updates["head"]["bias"].round(3))
        [-0. -0. -0. -0.] [-0.1 -0.1]

    References:
        Gruntkowska, Maziane, Qu, Richtárik, *Drop-Muon: Update Less, Converge Faster*, 2025,
        arXiv:2510.02239, Algorithm 1, in its LMO form with radius γ. The shape factor is Muon's
        (Jordan et al., 2024), and the auxiliary optimizer is customary, not the paper's.
    """
    sampler = layer_mask_sampler(
        layers, depth_distribution, seed=seed, steps_per_draw=steps_per_draw
    )
    subtrees = _muon_subtrees(
        learning_rate,
        momentum=momentum,
        lmo=lmo,
        weight_decay=weight_decay,
        auxiliary=auxiliary,
        auxiliary_learning_rate=auxiliary_learning_rate,
        labels=labels,
        layers=layers,
    )
    return sampler.attach_to(optax.chain(subtrees, sampler))


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: optax.GradientTransformation | None = None,
    lmo: optax.GradientTransformation | None = None,
    weight_decay: float = 0.0,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
    labels: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon: :func:`drop_muon` with every layer in every step, and therefore without layers.

    Of a network with stacked layers it does not know which leaves are; there take
    `drop_muon(…, layers, full_depth(), seed=0)` and `layers.mask(0)`.

    It differs from `optax.contrib.muon` in: 1. the polynomial, Polar Express by default, which is
    closer to the polar factor at five steps as well. 2. Decay 0.9, and no Nesterov momentum.
    3. Convolutions and named axes are matrices too; embeddings are not. 4. A leaf it cannot handle
    is an error at `init`. Its `beta=0.95, nesterov=True` is
    `momentum=dm.momentum(0.95, nesterov=True)`, up to its bias correction, which moved the second
    and third step by 5 % and fades; its `ns_coeffs` and `ns_steps` are
    `lmo=dm.newton_schulz_lmo(shape_factor="muon", coefficients="muon", num_steps=5)`; its
    `consistent_rms=0.2` is `shape_factor="moonlight"`.

    Args:
        learning_rate: The radius of a step, or a schedule of it.
        momentum: As in :func:`drop_muon`.
        lmo: As in :func:`drop_muon`.
        weight_decay: As in :func:`drop_muon`.
        auxiliary: As in :func:`drop_muon`.
        auxiliary_learning_rate: As in :func:`drop_muon`.
        labels: As in :func:`drop_muon`.

    Returns:
        A transformation. It takes no `layer_mask`.

    Raises:
        TypeError: In `update`, for a `layer_mask`: Adam's moments would not be frozen.
        ValueError: For bad numbers; at `init`, for a leaf labelled "matrix" that is none.

    Examples:
        >>> import jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> tx = dm.muon(0.1)
        >>> params = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
        >>> updates, _ = tx.update({"kernel": jnp.eye(2), "bias": jnp.ones(2)}, tx.init(params))
        >>> print(updates["bias"].round(3))
        [-0.1 -0.1]

    References:
        Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024.
    """
    subtrees = _muon_subtrees(
        learning_rate,
        momentum=momentum,
        lmo=lmo,
        weight_decay=weight_decay,
        auxiliary=auxiliary,
        auxiliary_learning_rate=auxiliary_learning_rate,
        labels=labels,
        layers=None,
    )
    return every_layer("muon", subtrees)


def _muon_subtrees(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: optax.GradientTransformation | None,
    lmo: optax.GradientTransformation | None,
    weight_decay: float,
    auxiliary: optax.GradientTransformation | None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None,
    labels: Any | Callable[[Any], Any] | None,
    layers: Layers | None,
) -> optax.GradientTransformationExtraArgs:
    """The chain of the matrices and the chain of everything else."""
    for name, given in (("momentum", momentum), ("lmo", lmo), ("auxiliary", auxiliary)):
        if given is not None:
            # The auxiliary optimizer is frozen layer by layer.
            check_direction(name, given, drops_layers=layers is not None and name != "auxiliary")
    if auxiliary_learning_rate is None:
        auxiliary_learning_rate = learning_rate
    for name, rate in (
        ("learning_rate", learning_rate),
        ("auxiliary_learning_rate", auxiliary_learning_rate),
    ):
        check_rate(name, rate)
    check_nonnegative("weight_decay", weight_decay)
    no_decay = is_python_number(weight_decay) and weight_decay == 0

    labels = matrix_labels if labels is None else labels
    if momentum is None:
        momentum = _momentum(decay=0.9)
    if auxiliary is None:
        auxiliary = optax.scale_by_adam()
    lacks_prev_params = _keeps_prev_params(momentum) and not _keeps_prev_params(auxiliary)
    freeze = optax.with_extra_args_support if layers is None else partial(per_layer, layers=layers)
    decay = [] if no_decay else [optax.add_decayed_weights(weight_decay)]
    direction = [momentum, newton_schulz_lmo(shape_factor="muon") if lmo is None else lmo]
    if layers is not None and layers.stacks:
        direction = [row_by_row(optax.chain(*direction, *decay), layers)]
    else:
        direction += map(freeze, decay)
    others = [row_by_row(keep_prev_params(), layers)] if lacks_prev_params else []

    def labels_of_rows(params: optax.Params) -> Any:
        shapes = params if layers is None else layers.row_shapes(params)
        return labels(shapes) if callable(labels) else labels

    return chain_subtrees(
        {
            "matrix": optax.chain(*direction, optax.scale_by_learning_rate(learning_rate)),
            "other": optax.chain(
                *others,
                freeze(auxiliary),
                optax.scale_by_learning_rate(auxiliary_learning_rate),
            ),
        },
        labels_of_rows,
    )


def _keeps_prev_params(transformation: optax.GradientTransformation) -> bool:
    """Whether its state holds previous parameters; False where that cannot be told."""
    try:
        state = jax.eval_shape(
            transformation.init, {"probe": jax.ShapeDtypeStruct((2, 2), np.float32)}
        )
    except (LookupError, TypeError, ValueError):
        return False  # made for other parameters
    return keeps_prev_params(state)
