"""The recipe of the shipped weights: `python -m crosslayer.zoo.emoji_llava.train --out DIR`."""

import argparse
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from crosslayer.zoo.emoji_llava.align import alignment_loss, patch_words
from crosslayer.zoo.emoji_llava.architecture import processor, untrained
from crosslayer.zoo.emoji_llava.batch import IGNORED, collate, pixel_values
from crosslayer.zoo.emoji_llava.conversation import conversations
from crosslayer.zoo.emoji_llava.sampling import scenes


@dataclass(frozen=True)
class Recipe:
    """Everything the weights depend on; the same recipe gives the same weights on the same machine."""

    alignment: int = 1500
    """Steps of the first stage, which teaches the vision tower and the projector alone."""
    steps: int = 2500
    """Steps of the second stage, which teaches the whole model to talk about scenes."""
    seed: int = 0
    batch: int = 64
    rate: float = 1e-3
    """Peak of the learning rate, in each stage reached linearly and left along a cosine that ends at 0."""
    warmup: int = 100
    """Steps until the peak."""
    decay: float = 0.01
    clip: float = 1.0
    """Largest norm of a gradient."""

    @property
    def total(self) -> int:
        """Steps of both stages."""
        return self.alignment + self.steps

    def rate_at(self, step: int) -> float:
        """The learning rate of `step`, counted from 0 through both stages."""
        first = step < self.alignment
        done, length = (step, self.alignment) if first else (step - self.alignment, self.steps)
        rise = min(1.0, (done + 1) / self.warmup)
        return self.rate * rise * (1 + math.cos(math.pi * done / length)) / 2


class Training:
    """A model on its way through a recipe. Step k sees the same scenes whether or not it was interrupted."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.step = 0
        self.model = untrained(recipe.seed)
        self.processor = processor()
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=recipe.decay
        )

    def advance(self) -> float:
        """Take one step and return its loss in nats."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.step)
        loss = self._alignment() if self.step < self.recipe.alignment else self._conversation()
        loss.backward()
        clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        """Write a checkpoint to `path`, whole or not at all."""
        unfinished = path.with_suffix(".part")
        state = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save({**state, "step": self.step, "recipe": asdict(self.recipe)}, unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        """Go on from the checkpoint at `path`, which must be of the same recipe."""
        state = torch.load(path, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(f"{path} belongs to another recipe: {state['recipe']}")
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def _alignment(self) -> Tensor:
        drawn = scenes("training", self.recipe.batch, seed=(self.recipe.seed, self.step))
        return alignment_loss(self.model, pixel_values(drawn, self.processor), patch_words(drawn))

    def _conversation(self) -> Tensor:
        turns = conversations(self.recipe.batch, seed=(self.recipe.seed, self.step))
        return conversation_loss(self.model, collate(turns, self.processor))


def conversation_loss(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """Mean over turns of the mean over response tokens, in nats: a short answer counts like a long caption."""
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    losses = cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")
    return (losses.sum(1) / (labels != IGNORED).sum(1)).mean()


def train(training: Training, checkpoint: Path, *, every: int = 500) -> None:
    """Take the steps that are left, with a checkpoint after `every` so many."""
    total = training.recipe.total
    bar = tqdm(range(training.step, total), initial=training.step, total=total, desc="train", mininterval=2)
    smooth = math.nan
    for _ in bar:
        loss = training.advance()
        smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if training.step % every == 0:
            training.save(checkpoint)


def export(training: Training, out: Path) -> None:
    """Write model and processor into `out`, each file whole or not at all."""
    unfinished = out / "export.part"
    training.model.save_pretrained(unfinished)
    training.processor.save_pretrained(unfinished)
    for file in sorted(unfinished.iterdir()):
        os.replace(file, out / file.name)
    unfinished.rmdir()


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description="train emoji-llava from scratch")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the checkpoint")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="steps of the second stage")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = options.out / "checkpoint.pt"
    training = Training(Recipe(steps=options.steps, seed=options.seed))
    if options.resume:
        training.load(checkpoint)
    train(training, checkpoint)
    export(training, options.out)
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
