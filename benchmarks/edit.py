"""What generation costs under an edit file beside plain generation of the same prompts.

Rounds of the two alternate; CPU seconds are summed over threads. Edited answers may be shorter or longer, so every
prompt gets the same number of tokens.

    python benchmarks/edit.py runs/clt results/edit.json
"""

import statistics
import time
from argparse import ArgumentParser
from contextlib import nullcontext

import torch
from tqdm import tqdm

import crosslayer as xl
from crosslayer.models.prompts import prepare
from crosslayer.replacement.model import continuation


def main() -> None:
    """Measure on the bundled scenes and print the ratio."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("edit")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    coder = xl.CrossLayerTranscoder.load(args.run).requires_grad_(False)
    model, data = xl.load_model("emoji-llava"), xl.load_data("emoji-scenes", n=args.prompts)
    batch = prepare(model.model, model.processor, [data[i].asked() for i in range(len(data))])
    seconds: dict[str, list[float]] = {"plain": [], "edited": []}
    for _ in tqdm(range(args.rounds + 1)):
        for name, under in (("plain", nullcontext()), ("edited", xl.load_edit(args.edit, model, coder))):
            with under:
                start = time.process_time()
                continuation(model, batch, min_new_tokens=16, max_new_tokens=16)
                seconds[name].append(time.process_time() - start)
    plain, edited = (statistics.median(found[1:]) for found in seconds.values())
    print(f"{args.prompts} prompts of 16 tokens: plain {plain:.3f} CPU s, edited {edited:.3f}: {edited / plain:.2f}x")


if __name__ == "__main__":
    main()
