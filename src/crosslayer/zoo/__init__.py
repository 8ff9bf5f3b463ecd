"""Models that come with crosslayer, by name."""

from crosslayer.zoo import emoji_llava

BUNDLED = {"emoji-llava": emoji_llava.folder}
"""Bundled name to the function that gives its folder."""
