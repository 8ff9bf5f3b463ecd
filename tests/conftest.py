"""Fixtures: a tiny random LLaVA and a tiny random Llama, saved and loaded as a user would, and examples for both."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may ask the hub

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import settings
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from crosslayer import LoadedModel, load_model
from crosslayer.zoo.emoji_llava.architecture import IMAGE_TOKENS, POSITIONS, WORDS, processor, tokenizer
from crosslayer.zoo.emoji_llava.scene import CELL, SIZE
from ranks import Ranks

PAD, BOS, EOS = (WORDS.index(word) for word in ("<pad>", "<s>", "</s>"))

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
settings.register_profile("crosslayer", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("crosslayer")


def text_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def save(model: PreTrainedModel, folder: Path) -> None:
    """Random weights without biases or norms of exactly 0 and 1, so that a mix-up of parameters shows."""
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llava"
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=CELL,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(),
        image_token_index=WORDS.index("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
    )
    torch.manual_seed(1)
    save(LlavaForConditionalGeneration(config), folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(2)
    save(LlamaForCausalLM(text_config()), folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava(llava_folder: Path) -> LoadedModel:
    return load_model(llava_folder)


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> LoadedModel:
    return load_model(llama_folder)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes that stand for the ranks of a job."""
    processes = Ranks()
    yield processes
    processes.close()
