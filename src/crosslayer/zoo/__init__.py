"""Models that come with crosslayer, by name."""

from crosslayer.zoo import emoji_llava, smollm2

BUNDLED = {"emoji-llava": emoji_llava.folder, "smollm2": smollm2.folder}
"""Bundled name to the function that gives its folder."""
GGUF = {"smollm2": smollm2.FILE}
"""Bundled name to the file of the folder that holds all of it, where the model is in llama.cpp's format."""
