"""Where the MLPs of each model family sit: the quirks of architectures as rows, proved again when a model is loaded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Paths of one family's modules, relative to the model and to a decoder layer."""

    layers: str
    """The list of decoder layers."""
    norm: str = "post_attention_layernorm"
    """The norm whose input is the residual stream that the MLP reads."""
    mlp: str = "mlp"
    """The module whose output is added to the residual stream."""


LLAMA = Family(layers="model.layers")
LLAVA = Family(layers="model.language_model.layers")

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "olmo": LLAMA,
    "smollm3": LLAMA,
    "llava": LLAVA,
    "llava_next": LLAVA,
    "vipllava": LLAVA,
}
"""By `config.model_type`."""
