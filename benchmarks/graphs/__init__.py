"""The small graphs of BurTorch: the same parameters, batches and steps for JAX and for PyTorch."""
