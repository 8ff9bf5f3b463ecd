"""Examples: prompts with pictures and responses, from files or the bundled world."""
