"""Parts of `benchmarks/estimator_error.py`."""
