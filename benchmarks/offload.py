"""What a run needs in memory when its weights stay in its files, beside the same run read into memory.

A random run is written shard by shard, never held. Each stage is a process of its own. Where weights stay on disk, the
system refuses the process more private memory (RLIMIT_DATA) than a quarter of the run beside the map itself, so that
what is not refused cannot have held it.

    python benchmarks/offload.py --gigabytes 4 --keep
"""

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from machine import keep, machine
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import crosslayer as xl
from crosslayer.attribution.attribute import Budget
from crosslayer.coders.checkpoint import CONFIG, INDEX
from crosslayer.coders.transcoder import Provenance
from crosslayer.files import write_json, write_tensors
from crosslayer.models.hooks import recording
from crosslayer.models.probe import probe
from crosslayer.models.prompts import prepare
from crosslayer.models.resolve import resolve_sites
from crosslayer.zoo.emoji_llava.architecture import WORDS, tokenizer

D, L, ACTIVE = 768, 12, 16
SHARE = 4
"""The run is so many times what a process may have for itself."""
PROMPT = xl.Example("prompt", " ".join([word for word in WORDS if word.isalpha()][:24]), form="text")


def language_model() -> xl.LoadedModel:
    """A random Llama of 12 layers of 768, the same each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=D, intermediate_size=2048, num_hidden_layers=L, num_attention_heads=12
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    sites, proof = resolve_sites(model, "resid", probe(model, None, False))
    return xl.LoadedModel("random", "", model, tokenizer(), sites, proof)


@torch.no_grad()
def write_run(folder: Path, model: xl.LoadedModel, n_bytes: int) -> None:
    """A random full CLT of about this size, thresholds so that 16 features of a layer are active at a position."""
    wiring = xl.Wiring.full(L)
    F = n_bytes // (4 * D * (wiring.n_pairs + L))
    reads, generator, where = dict[int, torch.Tensor](), torch.Generator().manual_seed(0), dict[str, str]()
    with recording(model.sites, reads.__setitem__, lambda *_: None):
        model.model(**prepare(model.model, model.processor, [PROMPT]).inputs, use_cache=False)
    for s in wiring.source_layers:
        W_enc = torch.empty(F, D).uniform_(-(F**-0.5), F**-0.5, generator=generator)
        pre = reads[s][0, 1:] @ W_enc.T
        cut = pre.flatten().topk(ACTIVE * len(pre) + 1).values[-1]
        W_dec = torch.empty(F, wiring.n_targets(s), D).uniform_(
            -((L * D) ** -0.5), (L * D) ** -0.5, generator=generator
        )
        tensors = {
            f"W_enc.{s}": W_enc,
            f"b_enc.{s}": torch.zeros(F),
            f"threshold.{s}": cut.expand(F),
            f"W_dec.{s}": W_dec,
        }
        tensors |= {f"b_dec.{s}": torch.zeros(D), f"first_write.{s}": torch.zeros(D)}
        write_tensors(folder / f"layer-{s}.safetensors", tensors)
        where |= dict.fromkeys(tensors, f"layer-{s}.safetensors")
    write_json(folder / INDEX, {"weight_map": where})
    with torch.device("meta"):
        coder = xl.CrossLayerTranscoder(wiring, D, F, xl.JumpReLU())
    coder.provenance = Provenance(model.id)
    write_json(folder / CONFIG, {"format_version": 1, **coder._config()})


def memory(kind: str) -> int:
    """Bytes, as Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024


@contextmanager
def watching(peaks: dict[str, int]) -> Iterator[None]:
    """Notes the most anonymous memory (looked at every 2 ms) and the most memory that the process has inside."""
    done, before = threading.Event(), memory("RssAnon")

    def look() -> None:
        while not done.wait(0.002):
            peaks["anonymous"] = max(peaks.get("anonymous", 0), memory("RssAnon") - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        peaks["resident"] = memory("VmHWM")


def digest(*tensors: torch.Tensor) -> str:
    """What tells results apart, to the last bit."""
    return hashlib.sha256(b"".join(tensor.contiguous().numpy(force=True).tobytes() for tensor in tensors)).hexdigest()[
        :8
    ]


def logits(model: xl.LoadedModel, coder: xl.CrossLayerTranscoder) -> str:
    """Of the replacement model."""
    batch = prepare(model.model, model.processor, [PROMPT])
    return digest(xl.ReplacementModel(model, coder).logits(batch))


def generate(model: xl.LoadedModel, coder: xl.CrossLayerTranscoder) -> str:
    """Eight tokens of the replacement model."""
    said = xl.ReplacementModel(model, coder).generate_batch([PROMPT], max_new_tokens=8, min_new_tokens=8)
    return hashlib.sha256(said[0].encode()).hexdigest()[:8]


def evaluate(model: xl.LoadedModel, coder: xl.CrossLayerTranscoder) -> str:
    """All figures."""
    return hashlib.sha256(xl.evaluate(model, coder, [PROMPT], max_new_tokens=4).to_json().encode()).hexdigest()[:8]


def graph(model: xl.LoadedModel, coder: xl.CrossLayerTranscoder) -> str:
    """Rows of the 256 most influential features."""
    found = xl.attribute(model, coder, PROMPT.prompt, form="text", budget=Budget(features=256))
    return digest(found.target, found.source, found.weight)


STAGES: dict[str, Callable[[xl.LoadedModel, xl.CrossLayerTranscoder], str]] = {
    "logits": logits,
    "generate": generate,
    "evaluate": evaluate,
    "graph": graph,
}


def measure(stage: str, folder: Path, in_memory: bool) -> dict[str, Any]:
    """One stage, from loading on."""
    model, size, peaks = language_model(), run_size(folder), dict[str, int]()
    STAGES["logits"](model, small_coder())  # what libraries set up for themselves is not the run's
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    if not in_memory:
        most = memory("VmData") + size + size // SHARE
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    started = time.process_time()
    with watching(peaks):
        coder = xl.CrossLayerTranscoder.load(folder).requires_grad_(False)
        if in_memory:
            for parameter in coder.parameters():
                parameter.data = parameter.data.clone()
        loaded = time.process_time()
        result = STAGES[stage](model, coder)
    return {"load": loaded - started, "seconds": time.process_time() - loaded, "result": result, **peaks}


def small_coder() -> xl.CrossLayerTranscoder:
    """Of the same wiring, with hardly any features."""
    return xl.CrossLayerTranscoder(xl.Wiring.full(L), D, 8, xl.TopK(1)).initialise(0).requires_grad_(False)


def run_size(folder: Path) -> int:
    """Bytes of a run."""
    return sum(file.stat().st_size for file in folder.iterdir())


def row(stage: str, folder: Path, in_memory: bool) -> tuple[str, str]:
    """A line of the table, and what came out."""
    command = [sys.executable, __file__, "--child", stage, "--folder", str(folder)]
    done = subprocess.run(command + ["--in-memory"] * in_memory, capture_output=True, text=True)
    where = "in memory" if in_memory else "in its files"
    if done.returncode:
        return f"| {stage} | {where} | refused: {done.stderr.strip().splitlines()[-1]} | | | |", ""
    found = json.loads(done.stdout.splitlines()[-1])
    sizes = [f"{found[kind] / 2**30:.2f}" for kind in ("anonymous", "resident")]
    times = [f"{found[kind]:.2f}" for kind in ("load", "seconds")]
    return f"| {stage} | {where} | {' | '.join(sizes + times)} |", found["result"]


def main() -> None:
    """Measure every stage both ways, print, and keep where asked to."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/DATE-offload-cpu.md")
    parser.add_argument("--child", choices=STAGES, help="measure one stage here, and print JSON")
    parser.add_argument("--in-memory", action="store_true")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(measure(args.child, args.folder, args.in_memory)))
        return
    with tempfile.TemporaryDirectory(prefix="offload-") as name:
        folder = Path(name)
        write_run(folder, language_model(), int(args.gigabytes * 2**30))
        size, rows, same = run_size(folder), list[str](), list[bool]()
        for stage in tqdm(STAGES):
            (lazy, ours), (eager, theirs) = row(stage, folder, False), row(stage, folder, True)
            rows += [lazy, eager]
            same.append(ours == theirs != "")
    lines = [
        f"# A run that stays in its files, {datetime.now(UTC).date()}",
        "",
        machine("cpu"),
        f"Run of {size / 2**30:.2f} GiB. Peak GiB of anonymous memory beyond what the process had before loading, and",
        "of all that is resident, pages of the files too, which the system drops when memory is short; CPU seconds.",
        f"In its files, no process could have more than {size / 2**30 / SHARE:.2f} GiB for itself.",
        f"Results equal to the last bit: {sum(same)} of {len(same)}.",
        "",
        "| stage | weights | anonymous | resident | load | stage |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    print("\n".join(lines))
    if args.keep:
        keep("offload", "cpu", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
