"""What benchmarks/momentum.py is made of."""
