"""Where the MLPs of each model family sit: the quirks of architectures as rows, proved again when a model is loaded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """One pattern of decoder layer; paths are relative to the layer.

    The layer's output is (stream read + write + what `adds` give) x `output_scale`.
    """

    norm: str | None = "post_attention_layernorm"
    """The norm whose input is the residual stream that the MLP reads; None where the MLP reads the stream itself."""
    mlp: str = "mlp"
    """The module that gets the MLP's input; not computed in a replacement model."""
    write: str | None = None
    """The module whose output is the write, where that is not `mlp`: a post-norm, or an inner projection."""
    scale: str | None = None
    """The layer's attribute that the write is multiplied with on its way to the stream."""
    adds: tuple[str, ...] = ()
    """Modules whose outputs the layer adds to the stream after the MLP has read it."""
    output_scale: str | None = None
    """The layer's attribute that the stream is multiplied with at its end."""


PRE_NORM = Block()
NEOX = Block(adds=("attention",))
SHARED_NORM = Block(norm="input_layernorm", adds=("self_attn",))
SANDWICH = Block(norm="pre_feedforward_layernorm", write="post_feedforward_layernorm")
POST_NORM = Block(norm=None, write="post_feedforward_layernorm")
GLM4 = Block(write="post_mlp_layernorm")
FEED_FORWARD = Block(mlp="feed_forward")
OPT = Block(norm="final_layer_norm", mlp="fc1", write="fc2")
GEMMA4 = Block("pre_feedforward_layernorm", write="post_feedforward_layernorm", output_scale="layer_scalar")
GEMMA4_THIRD_WRITE = Block(
    "pre_feedforward_layernorm",
    write="post_feedforward_layernorm",
    adds=("post_per_layer_input_norm",),
    output_scale="layer_scalar",
)
FALCON = (
    Block(norm="ln_mlp", adds=("self_attention",)),
    Block(norm="input_layernorm", adds=("self_attention",)),
    PRE_NORM,
)

BLOCKS: dict[str, tuple[Block, ...]] = {
    "apertus": (Block(norm="feedforward_layernorm"),),
    "bloom": (Block(mlp="mlp.dense_h_to_4h", write="mlp.dense_4h_to_h"),),
    "cohere": (SHARED_NORM,),
    "cohere2": (SHARED_NORM,),
    "exaone4": (POST_NORM,),
    "falcon": FALCON,
    "gemma": (PRE_NORM,),
    "gemma2": (SANDWICH,),
    "gemma3_text": (SANDWICH,),
    "gemma4_text": (GEMMA4_THIRD_WRITE, GEMMA4),
    "glm": (PRE_NORM,),
    "glm4": (GLM4,),
    "glm4v_text": (GLM4,),
    "gpt2": (Block(norm="ln_2"),),
    "gpt_neox": (NEOX, PRE_NORM),
    "gpt_oss": (PRE_NORM,),
    "gptj": (Block(norm="ln_1", adds=("attn",)),),
    "granite": (Block(scale="residual_multiplier"),),
    "granitemoe": (Block(mlp="block_sparse_moe", scale="residual_multiplier"),),
    "helium": (PRE_NORM,),
    "jamba": (Block(norm="pre_ff_layernorm", mlp="feed_forward"),),
    "lfm2": (Block(norm="ffn_norm", mlp="feed_forward"),),
    "llama": (PRE_NORM,),
    "llama4_text": (FEED_FORWARD,),
    "ministral3": (PRE_NORM,),
    "mistral": (PRE_NORM,),
    "mixtral": (PRE_NORM,),
    "molmo2_text": (PRE_NORM, Block(norm=None, write="post_attention_layernorm")),
    "mpt": (Block(norm="norm_2", mlp="ffn.up_proj", write="ffn.down_proj"),),
    "nemotron": (PRE_NORM,),
    "olmo": (PRE_NORM,),
    "olmo2": (POST_NORM,),
    "olmo3": (POST_NORM,),
    "olmoe": (PRE_NORM,),
    "opt": (OPT,),
    "phi": (SHARED_NORM,),
    "qwen2": (PRE_NORM,),
    "qwen2_5_vl_text": (PRE_NORM,),
    "qwen2_moe": (PRE_NORM,),
    "qwen2_vl_text": (PRE_NORM,),
    "qwen3": (PRE_NORM,),
    "qwen3_5_text": (PRE_NORM,),
    "qwen3_moe": (PRE_NORM,),
    "qwen3_next": (PRE_NORM,),
    "qwen3_vl_moe_text": (PRE_NORM,),
    "qwen3_vl_text": (PRE_NORM,),
    "seed_oss": (PRE_NORM,),
    "smollm3": (PRE_NORM,),
    "starcoder2": (PRE_NORM,),
}
"""Patterns to try in turn, by `model_type` of the language model."""

LAYERS = (
    "model.layers",
    "model.language_model.layers",
    "model.text_model.layers",
    "transformer.h",
    "transformer.blocks",
    "gpt_neox.layers",
    "model.decoder.layers",
    "language_model.model.layers",
    "language_model.model.decoder.layers",
)
"""Where the list of decoder layers may be, relative to the model."""

BETWEEN = {
    "qwen3_vl_text": "DeepStack: visual features are added to the stream after early layers, at image positions",
    "qwen3_vl_moe_text": "DeepStack: visual features are added to the stream after early layers, at image positions",
}
"""Families that add something to the stream between two layers, and what; any other that does is refused."""

MLLAMA = "its cross-attention layers gate what the MLP writes (by 0 before training) and are skipped without an image"
ALTUP = "AltUp keeps several residual streams, and layers mix them"
REFUSED = {
    "mllama": MLLAMA,
    "mllama_text_model": MLLAMA,
    "gemma3n": ALTUP,
    "gemma3n_text": ALTUP,
    "zamba": "its blocks share one MLP among layers",
    "zamba2": "its blocks share one MLP among layers",
}
"""Families that break an assumption, and which."""

REMARKS = {
    "gemma3": "attention goes both ways inside an image",
    "paligemma": "attention goes both ways inside an image and its prompt",
    "gemma4_text": "third write: a layer's own embedding of the token is added after the MLP, where the model has one",
}
"""What else to know about a family."""

MIXERS = {"linear_attn": "linear attention", "mamba": "Mamba", "conv": "short convolution"}
"""Modules that mix positions without attention patterns, by their name in the layer."""
