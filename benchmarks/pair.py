"""Small random models with transcoders, in files that circuit-tracer reads too: the same on every machine.

Numbers come from numpy's `RandomState`, whose stream numpy promises never to change.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import crosslayer as xl
from crosslayer.attribution.graph import AttributionGraph
from crosslayer.coders.transcoder import Provenance
from crosslayer.formats import read_circuit_tracer, write_circuit_tracer

LAYERS, WIDTH, FEATURES = 3, 16, 10
WORDS = ("<s>", "<unk>", *"abcdefghijklmnop")
PROMPT, TARGETS = "c a f e", "b g k"
SPECIAL = {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<s>", "unk_token": "<unk>"}
SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    **{f"{name}_id": WORDS.index(word) for name, word in SPECIAL.items() if name != "unk_token"},
}


@dataclass(frozen=True)
class Pair:
    """A family of models, and how its transcoders are wired."""

    family: str
    wiring: xl.Wiring
    backends: tuple[str, ...] = ("nnsight",)
    """Of circuit-tracer's that take it without the hub."""
    read: str = "resid"
    skip: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    """What the family has beyond `SHAPE`."""


BOTH = ("nnsight", "transformerlens")
CLT, PLT = xl.Wiring.full(LAYERS), xl.Wiring.per_layer(LAYERS)
UNCAPPED = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": None}
"""circuit-tracer explains logits before the final soft cap, we after it."""
PAIRS = {
    "llama, CLT": Pair("llama", CLT, BOTH),
    "llama, PLT with skips": Pair("llama", PLT, BOTH, read="mlp_in", skip=True),
    "gemma2, CLT": Pair("gemma2", CLT, config=UNCAPPED),
    "qwen3, PLT": Pair("qwen3", PLT, read="mlp_in"),
}


def make(pair: Pair) -> tuple[PreTrainedModel, xl.CrossLayerTranscoder]:
    """The model and its transcoder."""
    random = np.random.RandomState(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(pair.family, **SHAPE, **pair.config))
    for _, parameter in sorted(model.named_parameters()):
        fill(parameter.data, random)
    skip = pair.wiring if pair.skip else None
    coder = xl.CrossLayerTranscoder(pair.wiring, WIDTH, FEATURES, xl.JumpReLU(), skip=skip)
    for parameter in (*coder.W_enc, *coder.b_enc, *coder.W_dec, coder.b_dec, *coder.W_skip):
        fill(parameter.data, random)
    coder.with_thresholds(torch.from_numpy(random.random_sample((LAYERS, FEATURES))).float())
    coder.provenance = Provenance(pair.family, read=pair.read)
    return model, coder.requires_grad_(False)


def fill(tensor: Tensor, random: np.random.RandomState) -> None:
    """Matrices with rows of about length 1; vectors, 0 or 1 before, shifted a little."""
    values = torch.from_numpy(random.standard_normal(tensor.shape))
    tensor.copy_(values / tensor.shape[-1] ** 0.5 if tensor.ndim > 1 else tensor + values / 10)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, after a leading `<s>`."""
    letters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=letters, **SPECIAL)


def write(
    model: PreTrainedModel,
    words: PreTrainedTokenizerFast,
    coder: xl.CrossLayerTranscoder,
    folder: Path,
    prompt: str = PROMPT,
    targets: str = TARGETS,
) -> None:
    """`model` and `transcoders`, as both libraries load them, and in `asked.*` what is traced."""
    model.save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    special = {name: getattr(words, name) for name in SPECIAL}  # transformers 4 knows no other class by this name
    (folder / "model" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    )
    write_circuit_tracer(coder, folder / "transcoders")
    ids = {"ids": words(prompt)["input_ids"], "targets": words(targets, add_special_tokens=False)["input_ids"]}
    save_file({name: torch.tensor(numbers) for name, numbers in ids.items()}, folder / "asked.safetensors")
    (folder / "asked.json").write_text(json.dumps({"prompt": prompt, "targets": targets.split()}))


def load(folder: Path) -> tuple[xl.LoadedModel, xl.CrossLayerTranscoder]:
    """What `write` wrote, in our hands."""
    coder = read_circuit_tracer(folder / "transcoders").requires_grad_(False)
    return xl.load_model(folder / "model", read=coder.provenance.read, device="cpu"), coder


def trace(folder: Path, model: xl.LoadedModel, coder: xl.CrossLayerTranscoder) -> AttributionGraph:
    """Our graph of what was asked."""
    asked = json.loads((folder / "asked.json").read_text())
    return xl.attribute(model, coder, asked["prompt"], form="text", targets=asked["targets"])
