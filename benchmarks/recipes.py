"""Which recipe trains the best replacement model: variants on the bundled model, at equal tokens, on held-out scenes.

Each recipe is the tail of a `crosslayer train emoji-llava emoji-scenes` command line. All see the same captured
tokens; agreement and generation match are those of `crosslayer evaluate` on test scenes, and a feature is dead that
fires on none of 30,000 fresh tokens. Results go to benchmarks/recipes.md as they come; a recipe that is there already
is not trained again.

    python benchmarks/recipes.py
"""

import json
import shlex
import time
from argparse import ArgumentParser
from functools import cache
from pathlib import Path
from typing import Any

import torch
import tyro

import crosslayer as xl
from crosslayer.activations.capture import ModelSource
from crosslayer.activations.record import Activations
from crosslayer.activations.usable import usable
from crosslayer.coders.transcoder import CrossLayerTranscoder, Provenance
from crosslayer.memory import keep_freed_memory
from crosslayer.options import TrainOptions
from crosslayer.planning import plan
from crosslayer.training.scales import estimate_scales
from crosslayer.training.stream import Place, shuffled_batches
from crosslayer.training.trainer import Trainer

HERE = Path(__file__).parent
TOKENS = 150_000
FRESH_CHUNK = 10_000
"""Number of a chunk that no training reaches: for thresholds and dead features."""
SCENES = 96
WIDTH = 512
"""Features a layer, where a recipe names none."""
N_LAYERS, D_MODEL = 10, 128
"""The bundled model's."""
GROUPS = {
    "Sparsity, 64 features a token": [
        "--k 64 --sparsity joint-topk",
        "--k 64 --sparsity batch-topk",
        "--k 6 --sparsity topk",
        "--k 8 --sparsity groupmax",
        "--sparsity jumprelu",
        "--sparsity relu",
    ],
    "Sparsity, 16 features a token": [
        "--k 16 --sparsity joint-topk",
        "--k 16 --sparsity batch-topk",
        "--k 2 --sparsity topk",
        "--k 2 --sparsity groupmax",
        "--sparsity jumprelu --penalty 0.01",
        "--sparsity jumprelu --target-l0 16",
    ],
    "Sparsity, 8 features a token": [
        "--k 8 --sparsity joint-topk",
        "--k 8 --sparsity batch-topk",
    ],
    "Annealing and dead features": [
        "--k 16 --sparsity batch-topk --anneal-share 0",
        "--k 16 --sparsity batch-topk --anneal-share 0.6",
        "--k 16 --sparsity batch-topk --auxk 0",
        "--k 16 --sparsity batch-topk --auxk 0.25",
        "--k 16 --sparsity batch-topk --dead-penalty 1e-5",
        "--k 16 --sparsity joint-topk --auxk 0",
        "--k 64 --sparsity batch-topk --auxk 0.25",
        "--k 64 --sparsity batch-topk --d-transcoder 256",
        "--k 64 --sparsity batch-topk --d-transcoder 1024",
        "--k 64 --sparsity joint-topk --d-transcoder 256",
        "--k 64 --sparsity joint-topk --d-transcoder 1024",
    ],
    "Decoders": [
        "--k 16 --sparsity batch-topk --rank 1",
        "--k 16 --sparsity batch-topk --rank 2",
        "--k 16 --sparsity batch-topk --rank 4",
        "--k 16 --sparsity batch-topk --decoder source-tied",
        "--k 16 --sparsity batch-topk --decoder source-tied --pair-scale",
        "--k 16 --sparsity batch-topk --decoder target-tied",
        "--k 16 --sparsity batch-topk --topk-coalesced 16",
        "--k 16 --sparsity batch-topk --decoder source-and-target-tied",
        "--k 16 --sparsity batch-topk --pair-scale --pair-offset",
        "--k 16 --sparsity batch-topk --skip own",
        "--k 16 --sparsity batch-topk --skip pairs",
    ],
    "Window, equal tokens": [
        "--k 16 --sparsity batch-topk --span 1",
        "--k 16 --sparsity batch-topk --span 2",
        "--k 16 --sparsity batch-topk --span 4",
        "--k 16 --sparsity batch-topk --first-target 1",
    ],
    "Window and rank, equal parameters (4.2 million)": [
        "--k 16 --sparsity batch-topk --span 1 --d-transcoder 1664",
        "--k 16 --sparsity batch-topk --span 2 --d-transcoder 1152",
        "--k 16 --sparsity batch-topk --span 4 --d-transcoder 752",
        "--k 16 --sparsity batch-topk --rank 1 --d-transcoder 1600",
        "--k 16 --sparsity batch-topk --rank 2 --d-transcoder 1040",
    ],
    "Optimisers and precision": [
        "--k 16 --sparsity batch-topk --optimizer muon",
        "--k 16 --sparsity batch-topk --optimizer adamw",
        "--k 16 --sparsity batch-topk --precision bf16",
        "--k 16 --sparsity batch-topk --seed 1",
        "--k 16 --sparsity joint-topk --seed 1",
    ],
}
COLUMNS = ("parameters", "memory", "tokens/s", "fvu", "l0", "dead", "agreement", "generation", "KL")


class Captured:
    """Chunks of a model's activations, captured once."""

    def __init__(self, model: xl.LoadedModel):
        self.source = ModelSource(model, xl.load_data("emoji-scenes", model=model))

    @cache  # noqa: B019  one object, for as long as the process lives
    def chunk(self, index: int) -> Activations:
        """Chunk `index` of the training scenes."""
        return self.source.chunk(index)


def train(options: TrainOptions, model: xl.LoadedModel, captured: Captured) -> tuple[CrossLayerTranscoder, float]:
    """The finished transcoder, and tokens a CPU second of its steps."""
    config = options.config(model.n_layers, None, options.seed[0])
    trainer = Trainer(config, estimate_scales(captured.chunk(0)))
    spent = 0.0
    for batch in shuffled_batches(captured, config.batch_tokens, config.seed, Place()):
        start = time.process_time()
        trainer.step(batch.batch)
        spent += time.process_time() - start
        if trainer.finished:
            break
    coder = trainer.finish(fresh(captured))
    coder.provenance = Provenance(model.id, "", model.sites.read)
    return coder, trainer.tokens / spent


def fresh(captured: Captured) -> Activations:
    """Usable tokens that nothing was trained on."""
    tokens = Activations.concatenate([captured.chunk(FRESH_CHUNK), captured.chunk(FRESH_CHUNK + 1)])
    return tokens[usable(tokens).keep]


def dead_fraction(coder: CrossLayerTranscoder, captured: Captured) -> float:
    """Features that fire on none of 30,000 fresh tokens."""
    counts = torch.zeros(len(coder.sources), coder.d_transcoder)
    for part in fresh(captured).x[-30_000:].split(2048):
        counts += torch.stack([codes.counts() for codes in coder.encode(part)])
    return (counts == 0).float().mean().item()


def options_of(recipe: str) -> TrainOptions:
    """The options of a whole command line."""
    width = "" if "--d-transcoder" in recipe else f"--d-transcoder {WIDTH}"
    auxk = "" if "--auxk" in recipe else "--auxk 0.03125"
    line = f"emoji-llava emoji-scenes --out run --tokens {TOKENS} {recipe} {width} {auxk}"
    return tyro.cli(TrainOptions, args=shlex.split(line))


def measure(recipe: str, model: xl.LoadedModel, captured: Captured, scenes: Any) -> dict[str, str]:
    """One row of the table."""
    coder, speed = train(options_of(recipe), model, captured)
    found = xl.evaluate(model, coder, scenes)
    return {
        "tokens/s": f"{speed:,.0f}",
        "fvu": f"{found.fvu.value:.3f}",
        "l0": f"{found.l0.value:.1f}",
        "dead": f"{dead_fraction(coder, captured):.0%}",
        "agreement": str(found.top1_agreement),
        "generation": f"{found.generation_match.value:.3f}",
        "KL": f"{found.kl.value:.3f}",
    }


def cost(recipe: str) -> dict[str, str]:
    """Parameters and memory of a recipe: weights, gradients, moments and one step."""
    planned = plan(options_of(recipe).config(N_LAYERS, None, 0), D_MODEL)
    return {"parameters": f"{planned.n_parameters / 1e6:.2f} M", "memory": f"{planned.memory / 2**20:.0f} MiB"}


def markdown(rows: dict[str, dict[str, str]]) -> str:
    """All groups as tables."""
    lines = [f"# Recipes on emoji-llava\n\n{__doc__.split(chr(10), 1)[0]}\n"]
    lines.append(
        f"Each row is `crosslayer train emoji-llava emoji-scenes --tokens {TOKENS} --d-transcoder {WIDTH}\n"
        "--auxk 0.03125` with the options named (where they name one of these, that one holds). Tokens a CPU second\n"
        "of the training steps, one thread, on a shared machine; fvu, l0, agreement (95 % interval), generation match\n"
        f"and KL on {SCENES} held-out scenes; dead: no firing on 30,000 fresh tokens.\n"
        "Made by `python benchmarks/recipes.py`.\n"
    )
    rows = {recipe: {**cost(recipe), **row} for recipe, row in rows.items()}
    for group, recipes in GROUPS.items():
        lines += [f"## {group}\n", f"| options | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        lines += [f"| `{r}` | {' | '.join(rows[r][c] for c in COLUMNS)} |" for r in recipes if r in rows]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not there yet, keeping every row as it comes."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=HERE / "results" / "recipes.json")
    args = parser.parse_args()
    keep_freed_memory()
    rows = json.loads(args.rows.read_text()) if args.rows.is_file() else {}
    model = xl.load_model("emoji-llava")
    captured = Captured(model)
    scenes = xl.load_data("emoji-scenes", model=model, split="test", n=SCENES)
    args.rows.parent.mkdir(exist_ok=True)
    for recipe in dict.fromkeys(r for recipes in GROUPS.values() for r in recipes):
        if recipe not in rows:
            rows[recipe] = measure(recipe, model, captured, scenes)
            print(recipe, json.dumps(rows[recipe]), flush=True)
            args.rows.write_text(json.dumps(rows, indent=1) + "\n")
            (HERE / "recipes.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
