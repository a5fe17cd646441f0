"""How the size of a unit ball depends on the shape of the matrix: one table.

A factor c turns a plain norm into ‖X‖/c, its dual into c‖G‖*, and the LMO's direction D into cD.
The papers state these for PyTorch's weights (out, in); here fan-in and fan-out are told apart, so
that they are right for Flax's kernels (in, out).
"""

import math
from collections.abc import Callable

from dropmuon_jax._matrices import MatrixShape

SPECTRAL_FACTORS: dict[str, Callable[[MatrixShape], float]] = {
    # The ball of the spectral norm itself.
    "spectral": lambda shape: 1.0,
    # Jordan et al., 2024: max(1, rows / cols)^½ of a PyTorch (out, in) matrix; also Scion's "max".
    "muon": lambda shape: math.sqrt(max(1.0, shape.fan_out / shape.fan_in)),
    # Liu et al., 2025 (Moonlight), arXiv:2502.16982: root mean square 0.2 of the entries, as AdamW.
    "moonlight": lambda shape: 0.2 * math.sqrt(max(shape.fan_in, shape.fan_out)),
    # Bernstein and Newhouse, 2024, arXiv:2410.21265: the operator norm from RMS to RMS.
    "rms_to_rms": lambda shape: math.sqrt(shape.fan_out / shape.fan_in),
    # Pethick et al., 2025 (Scion), arXiv:2502.07529: the same of a matrix, and of a convolution
    # √(channels out / channels in) / window.
    "scion": lambda shape: math.sqrt(shape.fan_out / (shape.fan_in / shape.window)) / shape.window,
}

SHAPE_FACTORS: dict[str, Callable[[MatrixShape], float]] = SPECTRAL_FACTORS | {
    "one": lambda shape: 1.0,
    # Pethick et al., 2025: the sign of an output layer, a column, a row, a bias.
    "1/fan_in": lambda shape: 1 / shape.fan_in,
    # The same of a tied embedding (tokens, features), whose fan-in as an output layer is features.
    "1/fan_out": lambda shape: 1 / shape.fan_out,
    "sqrt(fan_out)": lambda shape: math.sqrt(shape.fan_out),
    "1/sqrt(fan_in)": lambda shape: 1 / math.sqrt(shape.fan_in),
    "sqrt(size)": lambda shape: math.sqrt(shape.fan_in * shape.fan_out),
}
