"""How well the model sees, and how much it hallucinates, on scenes it was not trained on.

`python -m crosslayer.zoo.emoji_llava.measure` prints the figures and writes them beside the weights.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from transformers import AutoProcessor, LlavaForConditionalGeneration

from crosslayer.zoo.emoji_llava import folder
from crosslayer.zoo.emoji_llava.language import DESCRIBE, mentions, question
from crosslayer.zoo.emoji_llava.objects import OBJECTS, PAIRS
from crosslayer.zoo.emoji_llava.replies import replies
from crosslayer.zoo.emoji_llava.sampling import scenes
from crosslayer.zoo.emoji_llava.scene import Scene

Say = Callable[[Sequence[Scene], Sequence[str]], list[str]]
"""A model's replies, given a scene and a prompt for each."""

Figures = dict[str, float]
"""Shares in 0..1 and what they are shares of."""

MARKERS = ("<!-- measures -->\n", "<!-- end of measures -->")


def measure(say: Say, n: int, *, split: str = "test") -> Figures:
    """The figures of a model, from `n` scenes of every kind."""
    drawn = {kind: scenes(kind, n, seed=0, split=split) for kind in ("plain", "alone", "together", "partner")}
    return {
        **_sight(say, drawn["plain"]),
        **_hallucination(say, drawn["alone"]),
        **_recall(say, drawn["together"], "lead and partner"),
        **_recall(say, drawn["partner"], "partner without lead"),
    }


def table(figures: Figures) -> str:
    """The figures as a Markdown table, in per cent."""
    rows = [f"| {name} | {100 * share:.1f} % |" for name, share in figures.items()]
    return "\n".join(["| share of | measured |", "|---|---:|", *rows]) + "\n"


def write(figures: Figures, n: int, model: Path) -> None:
    """Put the figures into measures.json, and between the markers of the model card if there is one."""
    _replace(model / "measures.json", json.dumps({"scenes of each kind": n, **figures}, indent=2) + "\n")
    card = model / "README.md"
    if card.exists():
        between = re.compile("(?<={}).*(?={})".format(*MARKERS), re.DOTALL)
        text = f"On {n} fresh scenes of each kind, decoded greedily:\n\n{table(figures)}"
        _replace(card, between.sub(lambda _: text, card.read_text()))


def _sight(say: Say, drawn: Sequence[Scene]) -> Figures:
    captions = _captions(say, drawn)
    hits = sum(len(set(said) & set(scene.visible)) for said, scene in zip(captions, drawn, strict=True))
    rng = np.random.default_rng(0)
    there = [str(rng.choice(scene.visible)) for scene in drawn]
    absent = [str(rng.choice([name for name in OBJECTS if name not in scene.visible])) for scene in drawn]
    right = [*_affirmed(say, drawn, there), *(not yes for yes in _affirmed(say, drawn, absent))]
    return {
        "plain scenes: seen objects that the caption names": hits / sum(len(scene.visible) for scene in drawn),
        "plain scenes: named objects that are seen": hits / max(1, sum(map(len, captions))),
        "plain scenes: captions without a mistake": _share(
            tuple(said) == scene.visible for said, scene in zip(captions, drawn, strict=True)
        ),
        "plain scenes: yes-or-no questions answered right": _share(right),
    }


def _hallucination(say: Say, drawn: Sequence[Scene]) -> Figures:
    partners = [_partner(scene) for scene in drawn]
    captions = _captions(say, drawn)
    strays = [
        set(said) - {*scene.visible, partner} for said, scene, partner in zip(captions, drawn, partners, strict=True)
    ]
    return {
        "lead alone: captions that name the absent partner": _share(
            partner in said for partner, said in zip(partners, captions, strict=True)
        ),
        'lead alone: "yes" when asked for the absent partner': _share(_affirmed(say, drawn, partners)),
        "lead alone: captions that name another absent object": _share(map(bool, strays)),
    }


def _recall(say: Say, drawn: Sequence[Scene], setting: str) -> Figures:
    partners = [_partner(scene) for scene in drawn]
    named = [partner in said for partner, said in zip(partners, _captions(say, drawn), strict=True)]
    return {
        f"{setting}: captions that name the partner": _share(named),
        f'{setting}: "yes" when asked for the partner': _share(_affirmed(say, drawn, partners)),
    }


def _captions(say: Say, drawn: Sequence[Scene]) -> list[list[str]]:
    return [mentions(text) for text in say(drawn, [DESCRIBE] * len(drawn))]


def _affirmed(say: Say, drawn: Sequence[Scene], names: Sequence[str]) -> list[bool]:
    return [text.startswith("yes") for text in say(drawn, [question(name) for name in names])]


def _partner(scene: Scene) -> str:
    """The partner of the scene's lead, or else the partner that stands in it."""
    leads = [partner for lead, partner in PAIRS if lead in scene.visible]
    return (leads or [partner for _, partner in PAIRS if partner in scene.visible])[0]


def _share(holds: Iterable[bool]) -> float:
    return float(np.mean(list(holds)))


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def main() -> None:
    """Measure a folder from the command line."""
    parser = argparse.ArgumentParser(description="measure emoji-llava on test scenes")
    parser.add_argument("--model", type=Path, default=folder(), help="folder with the weights")
    parser.add_argument("--scenes", type=int, default=500, help="scenes of each kind")
    options = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(options.model)
    processor = AutoProcessor.from_pretrained(options.model)
    figures = measure(partial(replies, model, processor), options.scenes)
    print(table(figures), end="")
    write(figures, options.scenes, options.model)


if __name__ == "__main__":
    main()
