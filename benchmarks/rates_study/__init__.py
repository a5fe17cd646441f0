"""Parts of `benchmarks/convergence_rates.py`."""
