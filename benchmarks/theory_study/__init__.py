"""What benchmarks/theory.py is made of."""
