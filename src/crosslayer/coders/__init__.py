"""Transcoders: sparse codes, decoders, sparsity, and their form on disk. Knows no language model."""
