"""Transcoders in the place of a model's MLPs."""
