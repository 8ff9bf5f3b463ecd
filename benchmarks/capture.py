"""What capturing to disk costs beside the bare forward pass of the same batches.

The bare pass runs the model on batches that are prepared already: as its users call it, to logits (`forward`), or
without the output head (`body`), which a capture does not need either. A capture prepares the batches (tokens,
pictures), records every layer's reads and writes, leaves padding out, and writes shards with checksums. Rounds of all
alternate. CPU seconds are summed over threads; wall seconds say what is overlapped where cores are free.

    python benchmarks/capture.py --keep
"""

import shutil
import statistics
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import torch
from machine import keep, machine
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import crosslayer as xl
from crosslayer.activations.capture import ModelSource
from crosslayer.models.probe import probe
from crosslayer.models.prompts import prepare
from crosslayer.models.resolve import resolve_sites
from crosslayer.zoo.emoji_llava.architecture import WORDS, tokenizer
from crosslayer.zoo.smollm2 import PACKAGES


@dataclass(frozen=True)
class Subject:
    """A model with data to capture."""

    name: str
    model: xl.LoadedModel
    data: list[xl.Example]


def bundled() -> Subject:
    """The bundled LLaVA on its scenes, drawn beforehand."""
    model, scenes = xl.load_model("emoji-llava"), xl.load_data("emoji-scenes", n=8192)
    return Subject("emoji-llava", model, [scenes[i] for i in range(len(scenes))])


def text_model() -> Subject:
    """SmolLM2-135M where its package is installed, else a random Llama of its shape, on texts of about 128 tokens."""
    words = [word for word in WORDS if word.isalpha()]
    texts = [" ".join(words[(7 * i + j * (i + 1)) % len(words)] for j in range(127)) for i in range(16)]
    data = [xl.Example(str(i), text, form="text") for i, text in enumerate(texts)]
    if all(map(find_spec, PACKAGES)):
        return Subject("smollm2", xl.load_model("smollm2"), data)
    return Subject("smollm2-shaped", smollm2_shaped(), data)


def smollm2_shaped() -> xl.LoadedModel:
    """A random Llama of the shape of SmolLM2-135M."""
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    sites, proof = resolve_sites(model, "resid", probe(model, None, False))
    return xl.LoadedModel("smollm2-shaped", "", model, tokenizer(), sites, proof)


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(subject: Subject, folder: Path, rounds: int, batch_prompts: int) -> str:
    """The ratios of a capture to the bare pass, as a line of a table."""
    model, source = subject.model, ModelSource(subject.model, subject.data, batch_prompts=batch_prompts)
    order = source.prompts(0, len(subject.data))
    groups = [order[i : i + batch_prompts] for i in range(0, len(order), batch_prompts)]
    batches = [prepare(model.model, model.processor, group) for group in groups]

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model.model(**batch.inputs, use_cache=False)

    @torch.no_grad()
    def body() -> None:
        for batch in batches:
            model.body(**batch.inputs, use_cache=False)

    def prepared() -> None:
        for group in groups:
            prepare(model.model, model.processor, group)

    def capture() -> None:
        xl.capture(model, subject.data, folder, overwrite=True)

    capture()  # warm
    forward()
    runs = (forward, body, prepared, capture)
    rounds_of = [tuple(map(timed, runs)) for _ in tqdm(range(rounds), subject.name)]

    def ratio(which: int, *parts: int) -> float:
        return statistics.median(found[3][which] / sum(found[part][which] for part in parts) for found in rounds_of)

    n = sum(int(batch.attention.sum()) for batch in batches)
    rate = n / statistics.median(captured[0] for *_, captured in rounds_of)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    cells = [f"{ratio(which, *parts):.2f}" for which in (0, 1) for parts in ((0,), (1,), (1, 2))]
    return f"| {subject.name} | {n:,} | {rate:,.0f} | {' | '.join(cells)} | {size:.0f} MiB |"


def main() -> None:
    """Measure both models, print, and keep where asked to."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/DATE-capture-cpu.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [
        f"# Capture beside the bare forward pass, {datetime.now(UTC).date()}",
        "",
        machine("cpu"),
        "A capture to bf16: its seconds over those of the model's forward pass, of that without its head (body),",
        "and of the latter and preparing the batches (+).",
        "",
        "| model | tokens | tokens/s | wall/forward | /body | /body + | CPU/forward | /body | /body + | store |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    folder = Path(tempfile.mkdtemp(prefix="capture-"))
    try:
        for subject, batch_prompts in ((bundled(), 64), (text_model(), 64)):
            lines.append(measure(subject, folder / "store", args.rounds, batch_prompts))
    finally:
        shutil.rmtree(folder)
    print("\n".join(lines))
    if args.keep:
        keep("capture", "cpu", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
