"""What benchmarks/orthogonalize.py is made of."""
