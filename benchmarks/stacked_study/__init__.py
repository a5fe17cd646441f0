"""What benchmarks/stacked_cost.py is made of."""
