"""How the tests compile, and fixtures that their files share."""

import gc
import os
import platform

import jax
import pytest

# Most programs run once, for milliseconds, and compile for longer, so their machine code is not
# optimized. XLA rewrites and fuses as ever: numerics, costs and the compiled program are the same.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # in the processes that tests start too
collect_ignore = ["eight_devices"]


def pytest_configure(config):
    """Says how programs are compiled, and where all workers and the next run find them again."""
    if config.option.markexpr == "not deep":
        _compile_quickly()
    if jax.device_count() >= 8:  # in processes of their own, which test_on_eight_devices.py starts
        collect_ignore.clear()
    if jax.config.jax_compilation_cache_dir is None and hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _compile_quickly():
    """Lets the everyday tests compile in half the time; the deep ones compile as users do.

    Of XLA's two sets of emitters (JAX 0.12 has one) the older, for which a scatter is a loop, and
    without the fused multiply-adds that they make in one program and not in another: AVX has none.
    """
    if jax.__version_info__ < (0, 11) and platform.machine() in ("x86_64", "AMD64"):
        flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_max_isa=AVX"
        os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"


def pytest_collection_finish():
    """Keeps the collector from going again and again through what imports have made, and stays."""
    gc.freeze()


@pytest.fixture
def strict_promotion():
    """Nothing is promoted silently. (Optax's Adam promotes, so this is not for every test.)"""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
