"""emoji-llava: a small LLaVA, trained from scratch on emoji scenes, that hallucinates in known ways."""

from pathlib import Path

__all__ = ["folder"]


def folder() -> Path:
    """The folder that `from_pretrained` loads model and processor from."""
    return Path(__file__).parent / "weights"
