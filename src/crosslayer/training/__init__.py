"""Training transcoders on activations. Never sees a language model."""
