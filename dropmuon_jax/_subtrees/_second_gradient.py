"""The gradient at the previous parameters, an extra argument that is cut to subtrees."""

from typing import Any

from dropmuon_jax._layers import restructure_like


def with_second_gradient(extra_args: dict[str, Any], updates: Any) -> dict[str, Any]:
    """The extra arguments, `prev_params_grads` among them in the containers of the updates."""
    grads = extra_args.get("prev_params_grads")
    if grads is None:
        return extra_args
    return extra_args | {"prev_params_grads": restructure_like("prev_params_grads", grads, updates)}
