"""A GPT whose blocks are stacked on a leading axis and run by `dm.scan_layers`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import dropmuon_jax as dm
from models import Attention, FeedForward


class Block(nn.Module):
    """Attention and a feed-forward network, each with its norm and residual."""

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, length, width) to the same shape."""
        return FeedForward(name="feed_forward")(Attention(self.num_heads, name="attention")(x))


class GPT(nn.Module):
    """A language model that predicts a token at every position."""

    vocabulary: int
    width: int
    num_heads: int
    num_blocks: int
    max_length: int
    tied: bool = False
    """Whether the token table is the head too."""
    policy: Callable[..., bool] | None = None
    """What a block saves for its backward pass, as in `jax.checkpoint`: by default its input."""

    @nn.compact
    def __call__(self, tokens: jax.Array, depth: int | jax.Array = 0) -> jax.Array:
        """(batch, length) tokens to the logits (batch, length, vocabulary).

        The backward pass ends at the block `depth`.
        """
        table = nn.Embed(self.vocabulary, self.width, name="tokens")
        positions = nn.Embed(self.max_length, self.width, name="positions")
        x = table(tokens) + positions(jnp.arange(tokens.shape[1]))
        block = Block(self.num_heads, parent=None)

        def init_blocks(key: jax.Array) -> Any:
            keys = jax.random.split(key, self.num_blocks)
            return jax.vmap(lambda key: block.init(key, x)["params"])(keys)

        x, _ = dm.scan_layers(
            lambda x, params: (block.apply({"params": params}, x), None),
            x,
            self.param("blocks", init_blocks),
            depth=depth,
            policy=self.policy,
        )
        x = nn.LayerNorm(name="final_norm")(x)
        return table.attend(x) if self.tied else nn.Dense(self.vocabulary, name="head")(x)

    def layer_patterns(self) -> list[Any]:
        """The embeddings, each block, and the head with its norm."""
        last = "final_norm" if self.tied else ("final_norm", "head")
        return [("tokens", "positions"), dm.stacked("blocks"), last]
