"""The shapes of GPTs whose steps are modelled."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import dropmuon_jax as dm
from scale_study.settings import NetworkName


class Network(NamedTuple):
    """A GPT whose head is its token table; biases, norms and positions are left out."""

    d_model: int
    num_blocks: int
    vocabulary: int = 50257

    @property
    def block_size(self) -> int:
        """Parameters of a block: q, k, v and o of d × d, and an MLP of d × 4d and 4d × d."""
        return 12 * self.d_model**2

    @property
    def table_size(self) -> int:
        """Parameters of the token table."""
        return self.vocabulary * self.d_model

    @property
    def num_parameters(self) -> int:
        """All of them."""
        return self.num_blocks * self.block_size + self.table_size

    @property
    def num_depths(self) -> int:
        """The table is the first layer, then comes each block."""
        return self.num_blocks + 1

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of the matrices of a block."""
        d = self.d_model
        return {**{name: (d, d) for name in "qkvo"}, "wi": (d, 4 * d), "wo": (4 * d, d)}

    def matrices(self) -> tuple[Any, dm.Layers]:
        """Those of all blocks as stacks, for `plan_layouts`, and the blocks as layers."""
        params: Any = {
            "blocks": {
                name: jax.ShapeDtypeStruct((self.num_blocks, *shape), jnp.float32)
                for name, shape in self.shapes().items()
            }
        }
        return params, dm.layers_by_path(params, [dm.stacked("blocks")])


NETWORKS: dict[NetworkName, Network] = {
    "124M": Network(768, 12),
    "350M": Network(1024, 24),
    "1.3B": Network(2048, 24),
    "7B": Network(4096, 32),
}
