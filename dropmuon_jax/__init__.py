"""Muon-like optimizers that skip layers and their backward pass, as Optax transformations.

A training loop needs five names: :func:`layers_by_path`, :class:`DepthSampler`,
:func:`uniform_depth`, :func:`drop_muon` and :func:`train_step`. What is not at the root lies in the
namespace of its subject: `layers`, `sampling`, `norms`, `schedules`, `orthogonalize`, `transforms`,
`optimizers`, `sharding`, `planning`, `compression` and `privacy`. `algorithm` is Algorithm 1 of the
paper, to be read, and `contrib` has systems that stand beside the others.
"""

from dropmuon_jax import (
    algorithm,
    compression,
    layers,
    norms,
    optimizers,
    orthogonalize,
    planning,
    privacy,
    sampling,
    schedules,
    sharding,
    transforms,
)
from dropmuon_jax import contrib as contrib  # by its name, and not among the everyday ones
from dropmuon_jax.backprop import (
    TrainStep,
    masked_value_and_grad,
    masked_value_and_grad_pair,
    scan_layers,
    switch_depth,
    train_step,
)
from dropmuon_jax.layers import (
    Layers,
    Roles,
    layers_by_path,
    matrix_labels,
    stacked,
    trace_layers,
)
from dropmuon_jax.layers.states import check_state
from dropmuon_jax.optimizers import (
    check_optimizer,
    drop_gluon,
    drop_muon,
    drop_scion,
    gluon,
    muon,
    scion,
)
from dropmuon_jax.planning import check_depths
from dropmuon_jax.sampling import (
    DepthSampler,
    LayerDistribution,
    epoch_shift_depth,
    fixed_depth,
    full_depth,
    record_gains,
    time_aware_depth,
    uniform_depth,
)
from dropmuon_jax.sharding import on_mesh, state_shardings
from dropmuon_jax.transforms import (
    accumulate,
    chain_subtrees,
    layer_mask_sampler,
    momentum,
    mvr_momentum,
    newton_schulz_lmo,
    norm_lmo,
    per_layer,
    prev_params,
)

__version__ = "0.2.0"

__all__ = [
    "DepthSampler",
    "LayerDistribution",
    "Layers",
    "Roles",
    "TrainStep",
    "accumulate",
    "algorithm",
    "chain_subtrees",
    "check_depths",
    "check_optimizer",
    "check_state",
    "compression",
    "drop_gluon",
    "drop_muon",
    "drop_scion",
    "epoch_shift_depth",
    "fixed_depth",
    "full_depth",
    "gluon",
    "layer_mask_sampler",
    "layers",
    "layers_by_path",
    "masked_value_and_grad",
    "masked_value_and_grad_pair",
    "matrix_labels",
    "momentum",
    "muon",
    "mvr_momentum",
    "newton_schulz_lmo",
    "norm_lmo",
    "norms",
    "on_mesh",
    "optimizers",
    "orthogonalize",
    "per_layer",
    "planning",
    "prev_params",
    "privacy",
    "record_gains",
    "sampling",
    "scan_layers",
    "schedules",
    "scion",
    "sharding",
    "stacked",
    "state_shardings",
    "switch_depth",
    "time_aware_depth",
    "trace_layers",
    "train_step",
    "transforms",
    "uniform_depth",
]
