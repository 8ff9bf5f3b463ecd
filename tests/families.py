"""Tiny random models of every family that the table knows, from configurations alone."""

from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BatchFeature,
    GenerationConfig,
    PreTrainedModel,
)

from crosslayer.models.probe import EXTRAS, PIXELS, n_image_tokens
from crosslayer.zoo.emoji_llava.architecture import WORDS, tokenizer

VOCABULARY = len(WORDS)
IMAGE = WORDS.index("<image>")
PICTURE = Image.new("RGB", (8, 8), "teal")
SPECIAL = {f"{name}_token_id": WORDS.index(word) for name, word in (("pad", "<pad>"), ("bos", "<s>"), ("eos", "</s>"))}
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    **SPECIAL,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
CLIP = {"model_type": "clip_vision_model", **VISION, "projection_dim": 16}
SIGLIP = {"model_type": "siglip_vision_model", **VISION}
LLAMA = {"model_type": "llama", **SMALL}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}

TEXT: dict[str, dict[str, Any]] = {
    "apertus": {},
    "bloom": {"n_layer": 2, "n_head": 2},
    "cohere": {},
    "cohere2": {},
    "exaone4": {"sliding_window": 8},
    "falcon": {"new_decoder_architecture": False, "head_dim": None},
    "falcon, two norms": {"new_decoder_architecture": True, "head_dim": None},
    "falcon, sequential": {"parallel_attn": False, "alibi": True, "head_dim": None},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma4_text": {
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 1,
        "layer_types": ["full_attention", "full_attention"],
        "global_head_dim": 8,
    },
    "gemma4_text, no third write": {
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention", "full_attention"],
        "global_head_dim": 8,
    },
    "glm": {},
    "glm4": {},
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 128},
    "gpt_neox": {},
    "gpt_neox, sequential": {"use_parallel_residual": False},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 128, "rotary_dim": 4},
    "granite": {"residual_multiplier": 0.25},
    "granitemoe": {"residual_multiplier": 0.25, "num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {},
    "jamba": {
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "llama4_text": {
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 24,
        "attn_temperature_tuning": False,
    },
    "ministral3": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 4},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 128},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "phi": {},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": {},
    "qwen3_5_text": LINEAR,
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16},
    "seed_oss": {},
    "smollm3": {},
    "starcoder2": {},
}
"""What a text family's small configuration has beside `SMALL`, by `model_type` (and variant)."""

QWEN_VISION = {
    "depth": 1,
    "embed_dim": 16,
    "hidden_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "intermediate_size": 24,
    "out_hidden_size": 16,
}
BLIP = {
    "vision_config": VISION,
    "qformer_config": {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "encoder_hidden_size": 16,
    },
    "num_query_tokens": 3,
}

VISUAL: dict[str, dict[str, Any]] = {
    "aya_vision": {"text_config": {"model_type": "cohere2", **SMALL}, "vision_config": SIGLIP, "downsample_factor": 1},
    "blip-2": {"text_config": {"model_type": "opt", **SMALL, **TEXT["opt"]}, **BLIP},
    "deepseek_vl": {"text_config": LLAMA, "vision_config": SIGLIP},
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **SMALL},
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "text_config": {"model_type": "gemma4_text", **SMALL, **TEXT["gemma4_text"]},
        "vision_config": {
            **VISION,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "global_head_dim": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
            "default_output_length": 4,
        },
        "audio_config": None,
    },
    "glm4v": {
        "text_config": {"model_type": "glm4v_text", **SMALL, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}},
        "vision_config": {**QWEN_VISION, "image_size": 16},
    },
    "idefics2": {
        "text_config": {"model_type": "mistral", **SMALL},
        "vision_config": VISION,
        "perceiver_config": {
            "hidden_size": 16,
            "resampler_n_latents": 3,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
    },
    "idefics3": {"text_config": LLAMA, "vision_config": VISION, "scale_factor": 2},
    "instructblip": {"text_config": {"model_type": "opt", **SMALL, **TEXT["opt"]}, **BLIP},
    "instructblip, llama": {"text_config": LLAMA, **BLIP},
    "internvl": {
        "text_config": {"model_type": "qwen2", **SMALL},
        "vision_config": {**VISION, "image_size": [8, 8], "patch_size": [4, 4]},
    },
    "lfm2_vl": {
        "text_config": {"model_type": "lfm2", **SMALL, **TEXT["lfm2"]},
        "vision_config": {"model_type": "siglip2_vision_model", **VISION, "num_patches": 16},
        "downsample_factor": 2,
        "projector_hidden_size": 16,
    },
    "llama4": {
        "text_config": {"model_type": "llama4_text", **SMALL, **TEXT["llama4_text"]},
        "vision_config": {
            **VISION,
            "intermediate_size": 64,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    },
    "llava": {"text_config": LLAMA, "vision_config": CLIP},
    "llava, deep vision": {"text_config": LLAMA, "vision_config": {**CLIP, "num_hidden_layers": 2}},
    "llava, gemma2": {"text_config": {"model_type": "gemma2", **SMALL}, "vision_config": CLIP},
    "llava_next": {"text_config": LLAMA, "vision_config": CLIP, "image_grid_pinpoints": [[8, 16]]},
    "llava_next_video": {"text_config": LLAMA, "vision_config": CLIP, "image_grid_pinpoints": [[8, 16]]},
    "llava_onevision": {
        "text_config": {"model_type": "qwen2", **SMALL},
        "vision_config": SIGLIP,
        "image_grid_pinpoints": [[8, 16]],
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **SMALL},
        "vision_config": {"model_type": "pixtral", **VISION, "image_size": 16, "head_dim": 8},
        "spatial_merge_size": 2,
    },
    "molmo2": {
        "text_config": {"model_type": "molmo2_text", **SMALL},
        "vision_config": {**VISION, "image_size": [16, 16], "num_key_value_heads": 2, "head_dim": 8},
        "adapter_config": {
            "vision_feature_layer": [0],
            "hidden_size": 16,
            "intermediate_size": 24,
            "text_hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
    },
    "ovis2": {
        "text_config": {"model_type": "qwen2", **SMALL},
        "vision_config": {**VISION, "vocab_size": 12, "hidden_stride": 1, "num_visual_indicator_tokens": 5},
        "hidden_size": 16,
        "vocab_size": VOCABULARY,
        "visual_indicator_token_ids": [40, 41, 42, 43, 44],
    },
    "paligemma": {"text_config": {"model_type": "gemma", **SMALL}, "vision_config": SIGLIP, "projection_dim": 16},
    "paligemma, gemma2": {
        "text_config": {"model_type": "gemma2", **SMALL},
        "vision_config": SIGLIP,
        "projection_dim": 16,
    },
    "qwen2_5_vl": {
        "text_config": {"model_type": "qwen2_5_vl_text", **SMALL, "rope_parameters": ROPE},
        "vision_config": {**QWEN_VISION, "fullatt_block_indexes": [0]},
    },
    "qwen2_vl": {
        "text_config": {"model_type": "qwen2_vl_text", **SMALL, "rope_parameters": ROPE},
        "vision_config": {**QWEN_VISION, "mlp_ratio": 2},
    },
    "qwen3_5": {
        "text_config": {"model_type": "qwen3_5_text", **SMALL, **LINEAR, "rope_parameters": ROPE},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [], "num_position_embeddings": 16},
    },
    "qwen3_vl": {
        "text_config": {"model_type": "qwen3_vl_text", **SMALL, "rope_parameters": ROPE},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "qwen3_vl_moe": {
        "text_config": {"model_type": "qwen3_vl_moe_text", **SMALL, **EXPERTS, "rope_parameters": ROPE},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "smolvlm": {"text_config": LLAMA, "vision_config": VISION, "scale_factor": 2},
    "video_llava": {"text_config": LLAMA, "vision_config": CLIP},
    "vipllava": {"text_config": LLAMA, "vision_config": CLIP, "vision_feature_layers": [-1, -1]},
}
"""Small configurations of vision-language families, by `model_type` (and variant)."""


def family(name: str) -> PreTrainedModel:
    """A tiny random model, without weights of exactly 0 and 1, so that a mix-up of parameters shows."""
    kind = name.split(",")[0]
    torch.manual_seed(0)
    if name in TEXT:
        settings = {key: value for key, value in {**SMALL, **TEXT[name]}.items() if value is not None}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    else:
        tokens = {"image_token_id": IMAGE, "image_token_index": IMAGE, "tie_word_embeddings": False}
        config = AutoConfig.for_model(kind, **VISUAL[name], **tokens)
        model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.generation_config = GenerationConfig(**SPECIAL, suppress_tokens=[IMAGE])
    return model.eval()


class FamilyProcessor:
    """What a family's own processor would make of text and pictures; the pixels are random."""

    image_processor = None

    def __init__(self, model: PreTrainedModel):
        self.model, self.tokenizer = model, tokenizer()
        kind = model.config.model_type
        self.pixels = PIXELS[kind](model.config) if kind in PIXELS else {}

    def __call__(self, text: list[str], images: list[Image.Image] | None = None, **settings: Any) -> BatchFeature:
        kind, config = self.model.config.model_type, self.model.config
        if not images:
            return self.tokenizer(text, **settings)
        marks = "<image>" * n_image_tokens(self.model, self.pixels)
        inputs = self.tokenizer([line.replace("<image>", marks) for line in text], **settings)
        many = {name: torch.cat([value] * len(images)) for name, value in self.pixels.items()}
        return BatchFeature({**inputs, **many, **EXTRAS.get(kind, lambda *_: {})(dict(inputs), config)})
