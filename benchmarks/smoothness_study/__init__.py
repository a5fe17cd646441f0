"""What benchmarks/smoothness.py is made of."""
