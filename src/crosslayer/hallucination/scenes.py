"""What to ask on the bundled world, where the truth is exact and hallucination is planted."""

from crosslayer.data.load import EMOJI_SCENES
from crosslayer.hallucination.pope import Counts, asked_about
from crosslayer.hallucination.responses import CAPTION, Query
from crosslayer.hallucination.synonyms import EMOJI, load_table
from crosslayer.hallucination.tasks import Task, questions_about
from crosslayer.zoo.emoji_llava.world import DESCRIBE, OBJECTS, PAIRS, Scene, question, render, scenes

KINDS = ("plain", "alone", "together", "partner")
COUNTED = 4_000
"""Training scenes in whose texts popular and accompanying objects are counted: partners accompany their leads."""
IMAGES = "images"
"""Folder of the pictures, in that of the results."""


def scene_task(n: int, *, questions: int = 3, split: str = "test", seed: int = 0) -> Task:
    """A caption of `n` scenes of each kind, and POPE's questions about them; all captions first, see `caption_task`.

    Adversarial questions ask about what the training texts name beside the objects that are there, seen or not: for a
    lead without its partner, that partner first.

    Args:
        n: scenes of each kind: plain, alone (a lead without its partner), together, partner (without its lead).
        questions: with the answer yes, at most, about each scene; as many with no for each sampling.
        split: that the scenes are drawn from.
        seed: of the scenes and questions.
    """
    counts = Counts.of(scene.named for scene in scenes("training", COUNTED, seed=seed))
    captions, questions_asked = list[Query](), list[Query]()
    by_image: dict[str, Scene] = {}
    for kind in KINDS:
        for number, scene in enumerate(scenes(kind, n, seed=seed, split=split)):
            caption = _caption(f"{split}-{seed}-{kind}-{number}", kind, scene)
            asked = asked_about(caption.image_id, caption.truth, OBJECTS, counts, questions, seed)
            captions.append(caption)
            questions_asked += questions_about(caption, asked, question)
            by_image[caption.image_id] = scene
    queries = [*captions, *questions_asked]
    return Task(
        name=EMOJI_SCENES,
        queries=queries,
        table=load_table(EMOJI),
        picture=lambda i: render(by_image[queries[i].image_id]),
    )


def _caption(known: str, kind: str, scene: Scene) -> Query:
    return Query(
        id=f"{known}:caption",
        image_id=known,
        image=f"{IMAGES}/{known}.png",
        prompt=DESCRIBE,
        kind=CAPTION,
        truth=scene.visible,
        setting=kind,
        pair=_pair(scene),
    )


def _pair(scene: Scene) -> tuple[str, str] | None:
    """The pair whose lead can be seen, or else whose partner can."""
    seen = scene.visible
    return next((p for p in PAIRS if p[0] in seen), None) or next((p for p in PAIRS if p[1] in seen), None)
