"""Workers of unequal speed: simulated ones, and processes."""
