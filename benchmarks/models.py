"""Small Flax networks, each with the path patterns of its layers, shallow to deep."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from images import NUM_CLASSES


class CNN(nn.Module):
    """Convolutions of 3 × 3 with ReLU and 2 × 2 max-pooling, then one dense layer."""

    channels: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits of a batch of images."""
        for features in self.channels:
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(NUM_CLASSES)(x.reshape(x.shape[0], -1))

    def layer_patterns(self) -> list[str]:
        """Each convolution is a layer, and the dense one."""
        return [*(f"Conv_{i}" for i in range(len(self.channels))), "Dense_0"]

    def roles(self) -> dict[str, str]:
        """What paths and shapes do not tell: the first kernel may have one channel in."""
        first, *_, last = self.layer_patterns()
        return {f"{first}/kernel": "hidden", f"{last}/kernel": "head"}


class MLP(nn.Module):
    """Dense layers with ReLU between them."""

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits of a batch of images or vectors."""
        x = x.reshape(x.shape[0], -1)
        for features in self.widths:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(NUM_CLASSES)(x)

    def layer_patterns(self) -> list[str]:
        """Each dense layer is a layer."""
        return [f"Dense_{i}" for i in range(len(self.widths) + 1)]


class Embedding(nn.Module):
    """Tokens and positions."""

    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(batch, length) tokens to (batch, length, width)."""
        positions = nn.Embed(tokens.shape[1], self.width)(jnp.arange(tokens.shape[1]))
        return nn.Embed(self.vocabulary, self.width)(tokens) + positions


class Attention(nn.Module):
    """Pre-norm causal self-attention and its residual; every kernel is a plain matrix."""

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, length, width) to the same shape."""
        batch, length, width = x.shape
        normed = nn.LayerNorm()(x)
        heads = (batch, length, self.num_heads, width // self.num_heads)
        query, key, value = (
            nn.Dense(width, name=name)(normed).reshape(heads) for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return x + nn.Dense(width, name="out")(mixed.reshape(x.shape))


class FeedForward(nn.Module):
    """Pre-norm two-layer perceptron and its residual."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, length, width) to the same shape."""
        width = x.shape[-1]
        hidden = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(width, name="down")(hidden)


class Head(nn.Module):
    """The last norm and the map to the vocabulary."""

    vocabulary: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, length, width) to the logits (batch, length, vocabulary)."""
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


class Transformer(nn.Module):
    """A small language model that predicts a token at every position."""

    vocabulary: int = 128
    width: int = 64
    num_heads: int = 4
    num_blocks: int = 2

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(batch, length) tokens to the logits (batch, length, vocabulary)."""
        x = Embedding(self.vocabulary, self.width, name="embedding")(tokens)
        for i in range(self.num_blocks):
            x = Attention(self.num_heads, name=f"attention_{i}")(x)
            x = FeedForward(name=f"feed_forward_{i}")(x)
        return Head(self.vocabulary, name="head")(x)

    def layer_patterns(self) -> list[str]:
        """The embedding, the halves of each block, and the head with its norm."""
        blocks = [(f"attention_{i}", f"feed_forward_{i}") for i in range(self.num_blocks)]
        return ["embedding", *(half for block in blocks for half in block), "head"]
