"""Circuits of hallucination: aggregated graphs of hallucinated against true answers, and what can be told from them."""
