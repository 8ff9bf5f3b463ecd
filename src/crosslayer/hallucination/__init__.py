"""Hallucination: measured on a model's own answers, then traced to what causes it."""
