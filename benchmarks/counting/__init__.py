"""What benchmarks/counts.py is made of."""
