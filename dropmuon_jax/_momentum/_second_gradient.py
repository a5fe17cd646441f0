"""What to say where the second gradient of a batch is missing."""

import difflib
from collections.abc import Mapping
from typing import Any


def missing_second_gradient(extra_args: Mapping[str, Any]) -> str:
    """The message for an `update` without the second gradient, which may have another name."""
    message = (
        "mvr_momentum needs the extra argument 'prev_params_grads', the gradient of this batch at "
        "the previous parameters: take both with dm.masked_value_and_grad_pair(loss_fn)(params, "
        "dm.prev_params(opt_state, params), batch, layer_mask=…)."
    )
    for name in extra_args:
        words = set(name.lower().split("_"))
        is_gradient = words & {"g", "grad", "grads", "gradient", "gradients"}
        if is_gradient and words & {"prev", "previous", "last", "old"} and "param" not in name:
            return (
                f"update() got {name!r}, which sounds like the gradient of the last step, on "
                f"another batch. With it MVR is the raw gradient. {message} With one gradient a "
                "step take dm.mars_momentum, which remembers the last one itself."
            )
        if difflib.get_close_matches(name.lower(), ("prev_params_grads",), n=1, cutoff=0.75):
            return f"update() got {name!r}. Did you mean 'prev_params_grads'? {message}"
    return message
