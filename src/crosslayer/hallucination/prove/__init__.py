"""Proof: what an edit changed, what chance and plain controls do, and what that does and does not support."""
