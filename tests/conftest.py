"""Fixtures shared by the test files."""

import jax
import pytest


@pytest.fixture
def strict_promotion():
    """Nothing is promoted silently. (Optax's Adam promotes, so this is not for every test.)"""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
