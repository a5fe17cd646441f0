"""Muon, and Drop-Muon."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from dropmuon_jax._checks import (
    check_transformation,
    describe,
    is_python_number,
)
from dropmuon_jax._counterparts import names_counterparts
from dropmuon_jax.layers.dimension_numbers import DimensionNumbers
from dropmuon_jax.layers.layers import Layers, check_layers
from dropmuon_jax.layers.prefixes import fitted_prefix, remembered_labels
from dropmuon_jax.layers.roles import Roles, as_roles, matrix_labels
from dropmuon_jax.layers.trees import is_static
from dropmuon_jax.norms.named import spectral_norm
from dropmuon_jax.optimizers.composition import (
    active_layers,
    as_momentum,
    checked_rate,
    every_layer,
    row_by_row,
    rows_of,
    with_prev_params,
)
from dropmuon_jax.orthogonalize.batches import Orthogonalize
from dropmuon_jax.orthogonalize.newton_schulz import newton_schulz
from dropmuon_jax.transforms.lmo import norm_lmo
from dropmuon_jax.transforms.masked import chain_subtrees, promoting
from dropmuon_jax.transforms.per_layer import per_layer


@names_counterparts
def drop_muon(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    *,
    momentum: float | jax.Array | optax.Schedule | optax.GradientTransformation = 0.9,
    orthogonalize: Orthogonalize | None = None,
    shape_factor: str = "muon",
    dimension_numbers: DimensionNumbers | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
    roles: Roles | Mapping[str, str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Drop-Muon: a Muon step of the layers from a depth to the output.

    The matrices of each active layer i step by

    .. math::
        M_i &\leftarrow \text{decay}\, M_i + (1 - \text{decay})\, \nabla_i f(X; \xi) \\
        X_i &\leftarrow X_i - \gamma_k
        \max(1, \tfrac{\text{fan-out}}{\text{fan-in}})^{1/2}\, UV^\top(M_i)

    and inactive layers stay bit for bit what they are, momentum and counts included. Everything
    that is no matrix (biases, norm scales, embeddings) goes to an auxiliary optimizer, frozen layer
    by layer in the same way.

    The depth of a step is drawn by a :class:`DepthSampler`. :func:`train_step` puts both into one
    call; in a training step of your own give `depth`, a static integer, to `update`, and take the
    gradients with :func:`masked_value_and_grad` or, inside one `jax.jit`, with `jax.grad`: XLA
    drops the backward pass that nobody uses.

    Stacked layers (:func:`stacked`, :func:`scan_layers`) step one by one, and may trace the depth.

    Args:
        learning_rate: The radius γ of a step, or a schedule of it over all steps.
        layers: The layers, over the whole parameters.
        momentum: The decay of the momentum of the matrices, a number or a schedule; or a
            transformation such as :func:`momentum` or :func:`mvr_momentum`. One that knows no
            masks, such as `optax.trace`, is frozen in inactive layers.
        orthogonalize: What gives UVᵀ, by default :func:`newton_schulz` with five steps of Polar
            Express.
        shape_factor: How the radius grows with the shape of a matrix; a row of the table in
            :func:`spectral_norm`.
        dimension_numbers: Which axes of a matrix are fan-in and which fan-out, as in
            :func:`norm_lmo`. "out_in" says of a whole tree that kernels are (out, in, \*window), as
            Equinox keeps them.
        weight_decay: Decoupled weight decay of the active matrices: X loses γ · weight_decay · X; a
            number, or a schedule of it over all steps.
        weight_decay_mask: Which matrices decay: a tree of booleans with the leaves of the
            parameters, or a prefix of it, or a function from the parameters to one; by default all.
        auxiliary: The direction for everything else, by default `optax.scale_by_adam()`. An
            optimizer with a learning rate, such as `optax.adamw(…)`, has its minus sign already
            and would climb: :func:`check_optimizer` says so.
        auxiliary_learning_rate: The learning rate of everything else, by default `learning_rate`.
        roles: From path patterns to roles, where paths do not tell: "hidden" and "head" are
            matrices, leaves of every other role go to the auxiliary optimizer.

    Returns:
        A transformation whose `update` requires one of the extra arguments `layer_mask`, the tree
        that :meth:`Layers.mask` makes, and `depth`.

    Raises:
        TypeError: For an argument of another Muon, naming the one that says the same here; in
            `update`, without `layer_mask` and `depth`.
        ValueError: For bad numbers; at `init`, for a leaf in no layer, or of ambiguous axes.

    Examples:
        >>> import jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> params = {"stem": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
        ...           "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
        >>> layers = dm.layers_by_path(params, ["stem", "head"])
        >>> optimizer = dm.drop_muon(0.1, layers)
        >>> updates, state = optimizer.update(params, optimizer.init(params), params, depth=1)
        >>> print(updates["stem"]["bias"], updates["head"]["bias"].round(3))
        [-0. -0. -0. -0.] [-0.1 -0.1]

    References:
        Gruntkowska, Maziane, Qu, Richtárik, *Drop-Muon: Update Less, Converge Faster*, 2025,
        arXiv:2510.02239, Algorithm 1, in its LMO form with radius γ. The shape factor is Muon's
        (Jordan et al., 2024), and the auxiliary optimizer is customary, not the paper's.
    """
    check_layers(layers)
    chain = _muon_chain(
        learning_rate,
        *(momentum, orthogonalize, shape_factor, dimension_numbers),
        *(weight_decay, weight_decay_mask, auxiliary, auxiliary_learning_rate),
        *(roles, layers),
    )
    return active_layers(chain, layers)


@names_counterparts
def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float | jax.Array | optax.Schedule | optax.GradientTransformation = 0.9,
    orthogonalize: Orthogonalize | None = None,
    shape_factor: str = "muon",
    dimension_numbers: DimensionNumbers | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
    roles: Roles | Mapping[str, str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon: :func:`drop_muon` with every layer in every step, and therefore without layers.

    Muon does not know which leaves are stacked layers; for a network with stacks take
    `drop_muon(…, layers)` and `depth=0`. The arguments are those of :func:`drop_muon`.

    It differs from `optax.contrib.muon` in: 1. the polynomial, Polar Express; 2. decay 0.9, without
    Nesterov's form and bias correction; 3. convolutions and named axes are matrices too, embeddings
    are not; 4. a leaf it cannot handle is an error at `init`. Its arguments are said so:

    ================================= ==========================================================
    `optax.contrib.muon`              here
    ================================= ==========================================================
    `beta=0.95, nesterov=True`        `momentum=dm.momentum(0.95, nesterov=True,
                                      bias_correction=True)`
    `mu_dtype`                        `momentum=dm.momentum(…, dtype=…)`
    `ns_coeffs`, `ns_steps`           `orthogonalize=dm.orthogonalize.newton_schulz("muon")`
    `consistent_rms=0.2`              `shape_factor="moonlight"`
    `adam_learning_rate`              `auxiliary_learning_rate`
    `adam_b1`, `adam_b2`, …           `auxiliary=optax.scale_by_adam(…, nesterov=True)`
    `muon_weight_dimension_numbers`   `dimension_numbers`, by path pattern
    ================================= ==========================================================

    `docs/coming_from_another_muon.md` has calls that take the same steps, for it and eight others.

    Returns:
        A transformation. It takes neither `layer_mask` nor `depth`.

    Raises:
        TypeError: For an argument of another Muon; in `update`, for a `layer_mask` or `depth`.
        ValueError: For bad numbers; at `init`, for a leaf of ambiguous axes.

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
    chain = _muon_chain(
        learning_rate,
        *(momentum, orthogonalize, shape_factor, dimension_numbers),
        *(weight_decay, weight_decay_mask, auxiliary, auxiliary_learning_rate),
        *(roles, None),
    )
    return every_layer("muon", chain)


def _muon_chain(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any,
    orthogonalize: Orthogonalize | None,
    shape_factor: str,
    dimension_numbers: DimensionNumbers | None,
    weight_decay: optax.ScalarOrSchedule,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None,
    auxiliary: optax.GradientTransformation | None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None,
    roles: Roles | Mapping[str, str] | None,
    layers: Layers | None,
) -> optax.GradientTransformation:
    """The matrices' momentum, LMO and decay, and everything else's auxiliary, times their rates."""
    momentum = as_momentum(momentum, layers)
    orthogonalize = newton_schulz() if orthogonalize is None else orthogonalize
    auxiliary = optax.scale_by_adam() if auxiliary is None else auxiliary
    learning_rate = checked_rate("learning_rate", learning_rate)
    if auxiliary_learning_rate is not None:
        auxiliary_learning_rate = checked_rate("auxiliary_learning_rate", auxiliary_learning_rate)
    weight_decay = checked_rate("weight_decay", weight_decay)
    check_transformation("auxiliary", auxiliary)
    roles = as_roles(roles)

    @remembered_labels
    def labels(params: optax.Params) -> Any:
        return matrix_labels(rows_of(params, layers), dimension_numbers, roles)

    mask_of = fitted_prefix(
        "weight_decay_mask", True if weight_decay_mask is None else weight_decay_mask, _check_decays
    )

    def decays(params: optax.Params) -> Any:
        return jax.tree.map(
            lambda label, flag: label == "matrix" and flag, labels(params), mask_of(params)
        )

    lmo = norm_lmo(
        spectral_norm(shape_factor, orthogonalize=orthogonalize),
        dimension_numbers=dimension_numbers,
    )
    frozen = promoting(auxiliary) if layers is None else per_layer(auxiliary, layers)
    directions = {"matrix": row_by_row(optax.chain(momentum, lmo), layers), "other": frozen}
    links: list[optax.GradientTransformation] = [
        with_prev_params(chain_subtrees(directions, labels), labels, layers)
    ]
    if not (is_python_number(weight_decay) and weight_decay == 0):
        links.append(promoting(optax.add_decayed_weights(weight_decay, decays)))
    if auxiliary_learning_rate is None:
        links.append(promoting(optax.scale_by_learning_rate(learning_rate)))
    else:
        rates = {"matrix": learning_rate, "other": auxiliary_learning_rate}
        links.append(
            chain_subtrees(
                {of: promoting(optax.scale_by_learning_rate(rate)) for of, rate in rates.items()},
                labels,
            )
        )
    return optax.chain(*links)


def _check_decays(path: str, flag: Any) -> None:
    if not is_static(flag):
        raise TypeError(
            f"weight_decay_mask must have Python booleans as leaves, got {describe(flag)} at "
            f"'{path}'."
        )
