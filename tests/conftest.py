"""Fixtures shared by the test files."""

import jax
import pytest

# They run in processes of their own, started by test_on_eight_devices.py.
collect_ignore = [] if jax.device_count() >= 8 else ["eight_devices"]


@pytest.fixture
def strict_promotion():
    """Nothing is promoted silently. (Optax's Adam promotes, so this is not for every test.)"""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles machine code without optimizations, where compiling takes longer than running.

    XLA rewrites and fuses as ever: numerics, costs and the compiled program are the same.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
