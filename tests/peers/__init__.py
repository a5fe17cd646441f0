"""Trajectories of the other optimizers that are called Muon, and the program that records them."""
