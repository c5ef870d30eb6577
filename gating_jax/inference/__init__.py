"""Compiled, pruned and exported forms of a trained network."""
