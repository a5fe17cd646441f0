"""What the studies of theory share, and are made of."""
