"""Arguments of other optimizers, and what says the same here: for errors that name it.

Behind a name stands the code that says the same, and behind a semicolon what there is to know.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
Counterparts = Mapping[str, str]

_NEWTON_SCHULZ = "dm.orthogonalize.newton_schulz(num_steps=5)"
_SAMPLER = "sampler=dm.DepthSampler(layers, dm.uniform_depth(), seed=0)"
_ROLES = "dict.fromkeys(dm.layers.ROLES, 1.0)"

_OF_ALL_OPTIMIZERS: Counterparts = {
    "lr": "learning_rate=0.1",
    **dict.fromkeys(("beta", "betas", "decay"), "momentum=0.95"),
    "nesterov": "momentum=dm.momentum(0.95, nesterov=True)",
    "mu_dtype": "momentum=dm.momentum(0.9, dtype=jnp.bfloat16)",
    "muon_weight_dimension_numbers": "dimension_numbers={}; by path pattern",
    "adaptive": "dm.transforms.norm_sharp(dm.norms.spectral_norm()); in the place of an LMO",
    "labels": "roles={}; from path patterns to roles",
    "seed": "dm.DepthSampler(layers, dm.uniform_depth(), seed=0); draws are its own",
}
_OF_MUON: Counterparts = {
    **_OF_ALL_OPTIMIZERS,
    "b1": "momentum=0.95; of Adam there is auxiliary=optax.scale_by_adam(…)",
    "b2": "auxiliary=optax.scale_by_adam(b2=0.999)",
    "ns_coeffs": 'orthogonalize=dm.orthogonalize.newton_schulz("muon", num_steps=5)',
    **dict.fromkeys(("ns_steps", "num_steps", "backend_steps"), f"orthogonalize={_NEWTON_SCHULZ}"),
    "adjust_lr_fn": 'shape_factor="moonlight"; "original" of PyTorch is "muon"',
    "preconditioning": 'orthogonalize=dm.orthogonalize.newton_schulz(preconditioning="schatten")',
    "consistent_rms": 'shape_factor="moonlight"; its RMS is 0.2',
    "mask": "weight_decay_mask=True",
    "wd": "weight_decay=0.1",
    "adam_learning_rate": "auxiliary_learning_rate=0.1",
    "adam_b1": "auxiliary=optax.scale_by_adam(b1=0.9)",
    "adam_b2": "auxiliary=optax.scale_by_adam(b2=0.999)",
    "eps": "auxiliary=optax.scale_by_adam(eps=1e-8); the matrices need none",
    "adam_eps": "auxiliary=optax.scale_by_adam(eps=1e-8)",
    "adam_eps_root": "auxiliary=optax.scale_by_adam(eps_root=1e-8)",
    "adam_weight_decay": "auxiliary=optax.chain(optax.scale_by_adam(), "
    "optax.add_decayed_weights(0.1))",
    "lmo": f"orthogonalize={_NEWTON_SCHULZ}; for other norms there is dm.scion",
    "norms": f"dm.scion(0.1, {_ROLES}, norms={{}})",
    "radii": f"dm.scion(0.1, {_ROLES})",
}
_OF_ROLES: Counterparts = {
    **_OF_ALL_OPTIMIZERS,
    **dict.fromkeys(
        ("ns_coeffs", "ns_steps", "num_steps", "orthogonalize"),
        f'norms={{"hidden": dm.norms.spectral_norm("scion", orthogonalize={_NEWTON_SCHULZ})}}',
    ),
    "shape_factor": 'norms={"hidden": dm.norms.spectral_norm("muon")}',
    "norm": 'norms={"hidden": dm.norms.spectral_norm("scion")}',
    "b1": "momentum=0.9",
    "scale": f"radii={_ROLES}",
    "auxiliary": 'norms={"bias": dm.norms.rms_norm()}; every leaf has a norm, and none needs Adam',
    "auxiliary_learning_rate": f"radii={_ROLES}; a radius for each role",
}
_OF_SCION: Counterparts = {
    **_OF_ROLES,
    "unconstrained": "constrained=False",
    "weight_decay": "constrained=True; it pulls the parameters to 0 by the learning rate",
    "weight_decay_mask": "constrained=False; a constrained step pulls every leaf to 0",
}
_OF_GLUON: Counterparts = {
    **_OF_ROLES,
    "constrained": f"dm.scion(0.1, {_ROLES}, constrained=True)",
    "weight_decay": f"dm.scion(0.1, {_ROLES}, constrained=True); it pulls the parameters to 0",
}
_OF_MOMENTUM: Counterparts = {
    **dict.fromkeys(("beta", "beta1", "b1", "momentum"), "decay=0.95"),
    **dict.fromkeys(("mu_dtype", "accumulator_dtype"), "dtype=jnp.bfloat16"),
    "dampening": "decay=0.9; the new gradient weighs 1 - decay",
    "debias": "bias_correction=True; an LMO does not see the length of a momentum",
    "lr": "dm.muon(learning_rate=0.1); a momentum has none",
}
_NO_CORRECTION: Counterparts = dict.fromkeys(
    ("debias", "bias_correction"), "dm.momentum(0.95, bias_correction=True)"
)
_OF_MVR: Counterparts = {
    **_OF_MOMENTUM,
    **_NO_CORRECTION,
    "nesterov": "dm.momentum(0.95, nesterov=True)",
    "gamma": "dm.transforms.mars_momentum(gamma=0.025)",
}
_OF_MARS: Counterparts = {
    **_OF_MOMENTUM,
    **_NO_CORRECTION,
    "nesterov": "dm.momentum(0.95, nesterov=True)",
    "max_grad_norm": "max_norm=1.0",
}
_OTHER_LINKS: Counterparts = {
    **dict.fromkeys(
        ("momentum", "beta", "b1", "nesterov", "mu_dtype"),
        "dm.momentum(0.95, nesterov=True, dtype=jnp.float32); a link of its own, before this one",
    ),
    "weight_decay": "optax.add_decayed_weights(0.1); a link of its own, behind this one",
}
_OF_NEWTON_SCHULZ: Counterparts = {
    **dict.fromkeys(("ns_steps", "steps"), "num_steps=5"),
    "ns_coeffs": 'coefficients="muon"',
    "eps": 'preconditioning="frobenius"; the norm that a matrix is divided by needs no eps',
}
_OF_NEWTON_SCHULZ_LMO: Counterparts = {
    **_OF_NEWTON_SCHULZ,
    **_OTHER_LINKS,
    **dict.fromkeys(("lr", "learning_rate", "scale"), "radius=0.1"),
    "norm": "dm.norm_lmo(dm.norms.sign_norm())",
    "orthogonalize": f"dm.norm_lmo(dm.norms.spectral_norm(orthogonalize={_NEWTON_SCHULZ}))",
    "consistent_rms": 'shape_factor="moonlight"; its RMS is 0.2',
    "adaptive": "dm.transforms.norm_sharp(dm.norms.spectral_norm())",
    "muon_weight_dimension_numbers": "dimension_numbers={}; by path pattern",
}
_OF_SPECTRAL_NORM: Counterparts = {
    **dict.fromkeys(
        ("coefficients", "num_steps", "ns_coeffs", "ns_steps", "dtype"),
        f"orthogonalize={_NEWTON_SCHULZ}",
    ),
    "consistent_rms": 'shape_factor="moonlight"; its RMS is 0.2',
}
_OF_NORM_LMO: Counterparts = {
    **_OTHER_LINKS,
    **dict.fromkeys(
        ("orthogonalize", "num_steps", "ns_steps"),
        f"norm=dm.norms.spectral_norm(orthogonalize={_NEWTON_SCHULZ})",
    ),
    **dict.fromkeys(("lr", "learning_rate", "scale"), "radius=0.1"),
    "shape_factor": 'norm=dm.norms.spectral_norm("muon")',
    "muon_weight_dimension_numbers": "dimension_numbers={}; by path pattern",
}
_OF_NORM_SHARP: Counterparts = {
    **_OF_NORM_LMO,
    **dict.fromkeys(("lr", "learning_rate", "scale", "radius"), "step_size=0.1"),
}
_OF_ACCUMULATION: Counterparts = dict.fromkeys(
    ("every_k_schedule", "steps_per_draw", "num_micro_batches"),
    f"{_SAMPLER[:-1]}, steps_per_draw=2)",
)
_OF_TRAIN_STEP: Counterparts = {
    **dict.fromkeys(("layers", "seed", "distribution"), _SAMPLER),
    "donate_argnums": "donate=True",
    "in_shardings": "out_shardings=None; they say where parameters and state come from too",
}
_OF_MASK_SAMPLER: Counterparts = dict.fromkeys(("key", "rng"), "seed=0; or a key of JAX")


# By the function that has no such argument.
COUNTERPARTS: Mapping[str, Counterparts] = {
    **dict.fromkeys(("muon", "drop_muon"), _OF_MUON),
    **dict.fromkeys(("scion", "drop_scion"), _OF_SCION),
    **dict.fromkeys(("gluon", "drop_gluon"), _OF_GLUON),
    "momentum": _OF_MOMENTUM,
    "mvr_momentum": _OF_MVR,
    "mars_momentum": _OF_MARS,
    "newton_schulz": _OF_NEWTON_SCHULZ,
    "newton_schulz_lmo": _OF_NEWTON_SCHULZ_LMO,
    "spectral_norm": _OF_SPECTRAL_NORM,
    "norm_lmo": _OF_NORM_LMO,
    "norm_sharp": _OF_NORM_SHARP,
    "chain_subtrees": {"param_labels": 'labels="all"'},
    "accumulate": _OF_ACCUMULATION,
    "train_step": _OF_TRAIN_STEP,
    "layer_mask_sampler": _OF_MASK_SAMPLER,
}


def names_counterparts(function: Function) -> Function:
    """Lets a function refuse the arguments of its peers by naming what says the same here."""
    counterparts = COUNTERPARTS[function.__name__]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name in counterparts:
                raise TypeError(
                    f"{function.__name__}() has no argument {name!r}: say {counterparts[name]}."
                )
        return function(*args, **kwargs)

    return call  # pyright: ignore[reportReturnType]
