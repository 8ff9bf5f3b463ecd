"""Stock Hugging Face models: where their MLPs read and write, and hooks there. Knows no coder."""
