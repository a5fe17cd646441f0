"""How the tests compile, and fixtures that their files share."""

import jax
import pytest

# They run in processes of their own, started by test_on_eight_devices.py.
collect_ignore = [] if jax.device_count() >= 8 else ["eight_devices"]

# Most programs run once, for milliseconds, and compile for longer, so their machine code is not
# optimized. XLA rewrites and fuses as ever: numerics, costs and the compiled program are the same.
jax.config.update("jax_disable_most_optimizations", True)


def pytest_configure(config):
    """Lets all workers, and the next run, use what has been compiled, from pytest's own cache."""
    if jax.config.jax_compilation_cache_dir is None and hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def strict_promotion():
    """Nothing is promoted silently. (Optax's Adam promotes, so this is not for every test.)"""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
