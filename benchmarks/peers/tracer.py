"""Attribute one prompt with circuit-tracer on one CPU thread; prints one JSON line.

    python benchmarks/peers/tracer.py FOLDER --backend transformerlens --batch 64

Runs in circuit-tracer's own environment. FOLDER holds a Hugging Face model in `model`, transcoders in circuit-tracer's
layout in `transcoders`, and in `asked.safetensors` the ids of the prompt and of the target tokens. Their graph goes to
`theirs.safetensors` there: `features` [A, 3] (layer, position, number), `activations` [A], and `edges` [R, C], with a
row for each feature and target, a column for each feature, error (by layer, then position) and token.
"""

import json
import time
from argparse import ArgumentParser
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from common import peak_mib
from safetensors.torch import load_file, save_file
from torch import nn
from transformer_lens import loading_from_pretrained
from transformers import AutoModelForCausalLM, AutoTokenizer

CPU = torch.device("cpu")


def transcoders(folder: Path) -> nn.Module:
    """The transcoders of a folder, in float32, by the loader that their kind has there."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    hooks = {name: config[name] for name in ("feature_input_hook", "feature_output_hook")}
    settings = {**hooks, "scan": None, "device": CPU, "dtype": torch.float32}
    if config["model_kind"] == "cross_layer_transcoder":
        return load_clt(str(folder), **settings)
    layers = range(len(list(folder.glob("layer_*.safetensors"))))
    return load_transcoder_set({i: str(folder / f"layer_{i}.safetensors") for i in layers}, **settings)


def main() -> None:
    """Load, attribute, write, print."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backend", choices=["transformerlens", "nnsight"], default="transformerlens")
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loading_from_pretrained.get_official_model_name = str  # else TransformerLens takes no folder
    name, settings = str(args.folder / "model"), {}
    if args.backend == "transformerlens":
        hf_model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        settings = {"hf_model": hf_model, "tokenizer": tokenizer}
    model = ReplacementModel.from_pretrained_and_transcoders(
        name, transcoders(args.folder / "transcoders"), args.backend, CPU, torch.float32, **settings
    )
    asked = load_file(args.folder / "asked.safetensors")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
    before, began = peak_mib() / 1024, time.process_time()
    graph = attribute(asked["ids"], model, attribution_targets=asked["targets"], batch_size=args.batch)
    seconds, peak = time.process_time() - began, peak_mib() / 1024
    features, targets, matrix = graph.active_features, len(graph.logit_targets), graph.adjacency_matrix
    edges = torch.cat([matrix[: len(features)], matrix[-targets:]])[:, :-targets]
    found = {"features": features, "activations": graph.activation_values, "edges": edges}
    save_file({name: part.contiguous() for name, part in found.items()}, args.folder / "theirs.safetensors")
    print(json.dumps({"cpu_seconds": seconds, "before": before, "peak": peak, "version": version("circuit-tracer")}))


if __name__ == "__main__":
    main()
