"""The untrained model and its processor: stock LLaVA classes at a size that trains on two CPU cores."""

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from crosslayer.zoo.emoji_llava.objects import OBJECTS
from crosslayer.zoo.emoji_llava.scene import CELL, GRID, SIZE

PAD, BOS, EOS, UNKNOWN, IMAGE = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")

GRAMMAR = (".", ",", "?", "a", "and", "describe", "the", "picture", "is", "there", "yes", "no")

WORDS = (*SPECIAL, *GRAMMAR, *OBJECTS)
"""The vocabulary; a word's place is its token id."""

IMAGE_TOKENS = GRID * GRID

POSITIONS = 128


def untrained(seed: int) -> LlavaForConditionalGeneration:
    """The model at its random start. Draws from, and restores, torch's global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(configuration())
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=32,
        pad_token_id=WORDS.index(PAD),
        bos_token_id=WORDS.index(BOS),
        eos_token_id=WORDS.index(EOS),
    )
    return model


def configuration() -> LlavaConfig:
    """Llama with 10 layers of width 128, CLIP vision tower with 3 layers of width 96 and a patch per cell."""
    language = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=10,
        num_attention_heads=4,
        initializer_range=0.08,  # the usual 0.02 suits widths in the thousands
        max_position_embeddings=POSITIONS,
        pad_token_id=WORDS.index(PAD),
        bos_token_id=WORDS.index(BOS),
        eos_token_id=WORDS.index(EOS),
    )
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=CELL,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=WORDS.index(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        dtype="float32",
    )


def processor() -> LlavaProcessor:
    """Pictures of any size come out as 96 x 96 pixels, and `<image>` in a text as 9 image tokens."""
    square = {"height": SIZE, "width": SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False),
        tokenizer=tokenizer(),
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or punctuation mark, in lower case, after a leading `<s>`; padded on the left."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, WORDS.index(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
