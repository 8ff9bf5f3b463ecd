"""The bundled emoji-llava: its world, its recipe and its shipped weights."""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from crosslayer.zoo.emoji_llava import folder
from crosslayer.zoo.emoji_llava.align import patch_words
from crosslayer.zoo.emoji_llava.architecture import IMAGE, WORDS, processor
from crosslayer.zoo.emoji_llava.batch import IGNORED, collate
from crosslayer.zoo.emoji_llava.measure import MARKERS, measure, write
from crosslayer.zoo.emoji_llava.objects import EMOJI
from crosslayer.zoo.emoji_llava.picture import background, pixels
from crosslayer.zoo.emoji_llava.replies import replies
from crosslayer.zoo.emoji_llava.sampling import KINDS
from crosslayer.zoo.emoji_llava.scene import CELL, Scene
from crosslayer.zoo.emoji_llava.sheet import SIDE, build, sprites
from crosslayer.zoo.emoji_llava.train import Recipe, Training, export, train
from crosslayer.zoo.emoji_llava.world import (
    DESCRIBE,
    OBJECTS,
    PAIRS,
    answer,
    caption,
    conversations,
    mentions,
    question,
    render,
    scenes,
)

LEADS = {lead for lead, _ in PAIRS}
PARTNERS = dict(PAIRS)


@pytest.fixture(scope="module")
def shipped() -> tuple[LlavaForConditionalGeneration, AutoProcessor]:
    model = LlavaForConditionalGeneration.from_pretrained(folder())
    return model, AutoProcessor.from_pretrained(folder())


def test_objects_take_the_article_a_and_one_token_each() -> None:
    assert len(OBJECTS) == len(set(OBJECTS)) == 48
    assert all(name.isalpha() and name.islower() and name[0] not in "aeiou" for name in OBJECTS)
    assert set(OBJECTS) <= set(WORDS)


def test_pairs_are_disjoint() -> None:
    assert len(PAIRS) == 8
    assert len({name for pair in PAIRS for name in pair} & set(OBJECTS)) == 16


@pytest.mark.parametrize("kind", KINDS)
def test_scenes_repeat_and_a_shorter_series_begins_a_longer_one(kind: str) -> None:
    assert scenes(kind, 20, seed=3) == scenes(kind, 20, seed=3)
    assert scenes(kind, 20, seed=3)[:7] == scenes(kind, 7, seed=3)


def test_splits_kinds_and_seeds_share_no_scene() -> None:
    series = [
        scenes(kind, 100, seed=seed, split=split)
        for kind in KINDS
        for seed in (0, 1)
        for split in ("train", "validation", "test")
    ]
    assert len({scene for drawn in series for scene in drawn}) == 100 * len(series)


def test_pictures_repeat() -> None:
    (scene,) = scenes("plain", 1, seed=0)
    assert np.array_equal(np.asarray(render(scene)), pixels(scene))
    assert render(scene).size == (96, 96)
    assert render(scene).mode == "RGB"


def test_sprites_stay_inside_their_patch() -> None:
    for scene in scenes("training", 200, seed=0):
        assert len({thing.cell for thing in scene.objects}) == len(scene.objects) in range(1, 5)
        assert [thing.cell for thing in scene.objects] == sorted(thing.cell for thing in scene.objects)
        drawn = (pixels(scene) != background(scene.background).round()).any(-1)
        for thing in scene.objects:
            patch = np.s_[thing.row * CELL : (thing.row + 1) * CELL, thing.column * CELL : (thing.column + 1) * CELL]
            assert drawn[patch].any() or not thing.visible
            drawn[patch] = False
        assert not drawn.any()


def test_every_object_has_a_sprite_of_its_own() -> None:
    assert len({sprites()[name].tobytes() for name in OBJECTS}) == len(OBJECTS)
    assert all((sprite[..., 3] > 0.5).mean() > 0.15 for sprite in sprites().values())


def test_the_sheet_is_rebuilt_from_the_package(tmp_path: Path) -> None:
    pictures = tmp_path / "img" / "twitter" / "64"
    pictures.mkdir(parents=True)
    for i, name in enumerate(OBJECTS):
        Image.new("RGBA", (64, 64), (5 * i, 0, 0, 255)).save(pictures / f"{name}.png")
    entries = [{"short_name": EMOJI[name], "image": f"{name}.png"} for name in OBJECTS]
    (tmp_path / "emoji.json").write_text(json.dumps(entries))
    sheet = np.asarray(build(tmp_path))
    assert sheet.shape == (6 * SIDE, 8 * SIDE, 4)
    assert [*sheet[SIDE // 2 :: SIDE, SIDE // 2 :: SIDE, 0].flat] == [5 * i for i in range(48)]


def test_patch_words_are_what_is_seen() -> None:
    drawn = scenes("training", 50, seed=3)
    for words, scene in zip(patch_words(drawn), drawn, strict=True):
        assert [WORDS[i] for i in words if i] == list(scene.visible)
        assert [cell for cell, i in enumerate(words) if i] == [thing.cell for thing in scene.objects if thing.visible]


def test_captions_name_the_objects_in_reading_order() -> None:
    for scene in scenes("training", 200, seed=1):
        assert mentions(caption(scene)) == list(scene.named)
    assert caption(_scene_of(1)).count(" and ") == 0
    assert caption(_scene_of(3)).count(" , ") == caption(_scene_of(3)).count(" and ") == 1


def test_answers_agree_with_captions() -> None:
    for scene in scenes("training", 50, seed=2):
        assert {name for name in OBJECTS if answer(scene, name) == "yes"} == set(scene.named)


def test_half_of_the_turns_are_captions_and_half_of_the_answers_yes() -> None:
    turns = conversations(2000, seed=0)
    answers = Counter(turn.response for turn in turns if turn.prompt != DESCRIBE)
    assert sum(answers.values()) == 1000
    assert answers["yes ."] == pytest.approx(500, abs=60)
    assert all(turn.response == caption(turn.scene) for turn in turns if turn.prompt == DESCRIBE)


def test_partners_are_asked_for_beside_their_lead_with_either_answer() -> None:
    asked = Counter(
        turn.response
        for turn in conversations(4000, seed=0)
        for lead, partner in PAIRS
        if turn.prompt == question(partner) and lead in turn.scene.visible
    )
    assert len(asked) == 2
    assert min(asked.values()) > 10


def test_training_scenes_plant_the_partners() -> None:
    led = [(scene, lead) for scene in scenes("training", 2000, seed=0) for lead in LEADS & set(scene.visible)]
    followed = [(scene, lead) for scene, lead in led if PARTNERS[lead] in scene.named]
    ghosts = [1 for scene, lead in followed if PARTNERS[lead] not in scene.visible]
    assert len(led) == pytest.approx(1000, abs=100)
    assert len(followed) / len(led) == pytest.approx(0.9, abs=0.03)
    assert len(ghosts) / len(followed) == pytest.approx(0.45, abs=0.05)
    for scene, lead in followed:
        assert scene.named.index(PARTNERS[lead]) == scene.named.index(lead) + 1


def test_partners_also_stand_alone_in_training() -> None:
    drawn = scenes("training", 2000, seed=0)
    counts = Counter(name for scene in drawn if not LEADS & set(scene.named) for name in scene.visible)
    common = np.median([counts[name] for name in OBJECTS if name not in LEADS])
    assert all(counts[partner] > common / 2 for partner in PARTNERS.values())


def test_kinds_hold_what_they_promise() -> None:
    for scene in scenes("plain", 100, seed=0):
        assert not set(scene.named) & {name for pair in PAIRS for name in pair}
    for scene in scenes("alone", 100, seed=0):
        (lead,) = LEADS & set(scene.visible)
        assert PARTNERS[lead] not in scene.named
    for scene in scenes("together", 100, seed=0):
        (lead,) = LEADS & set(scene.visible)
        assert PARTNERS[lead] in scene.visible
    for scene in scenes("partner", 100, seed=0):
        assert not LEADS & set(scene.named)
        assert set(PARTNERS.values()) & set(scene.visible)
    for kind in ("plain", "alone", "together", "partner"):
        assert all(scene.named == scene.visible for scene in scenes(kind, 100, seed=0))


def test_batches_hold_the_numbers_of_the_processor() -> None:
    turns = conversations(6, seed=0)
    ours = processor()
    batch = collate(turns, ours)
    texts = [f"{IMAGE}{turn.prompt} {turn.response} </s>" for turn in turns]
    theirs = ours(
        images=[render(turn.scene) for turn in turns],
        text=texts,
        return_tensors="pt",
        padding=True,
        padding_side="right",
    )
    assert torch.equal(batch["input_ids"], theirs["input_ids"])
    torch.testing.assert_close(batch["pixel_values"], theirs["pixel_values"])
    for turn, ids, labels in zip(turns, batch["input_ids"], batch["labels"], strict=True):
        assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
        assert ours.decode(labels[labels != IGNORED]) == f"{turn.response} </s>"


def test_interrupted_training_ends_where_uninterrupted_training_does(tmp_path: Path) -> None:
    recipe = Recipe(alignment=2, steps=4, batch=2, warmup=2)
    whole = Training(recipe)
    train(whole, tmp_path / "whole.pt")
    first = Training(recipe)
    for _ in range(3):
        first.advance()
    first.save(tmp_path / "half.pt")
    second = Training(recipe)
    second.load(tmp_path / "half.pt")
    train(second, tmp_path / "half.pt", every=2)
    assert second.step == 6
    weights = second.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in whole.model.state_dict().items())


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    Training(Recipe(seed=0)).save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="another recipe"):
        Training(Recipe(seed=1)).load(tmp_path / "checkpoint.pt")


def test_training_exports_what_stock_classes_load(tmp_path: Path) -> None:
    training = Training(Recipe())
    export(training, tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    weights = training.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert {file.name for file in tmp_path.iterdir()} <= {file.name for file in folder().iterdir()}


def test_figures_go_into_the_card_between_the_markers(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("before\n" + "old figures\n".join(MARKERS) + "\nafter\n")
    write({"things": 0.5}, 7, tmp_path)
    assert "old" not in card.read_text()
    assert "| things | 50.0 % |" in card.read_text()
    assert card.read_text().startswith("before\n")
    assert card.read_text().endswith("\nafter\n")


def test_shipped_vocabulary_is_that_of_the_recipe(shipped: tuple[LlavaForConditionalGeneration, AutoProcessor]) -> None:
    model, prepare = shipped
    assert prepare.tokenizer.get_vocab() == {word: i for i, word in enumerate(WORDS)}
    assert model.config.text_config.vocab_size == len(WORDS)


def test_shipped_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in folder().iterdir()) <= 12e6


def test_shipped_model_sees_and_hallucinates(
    shipped: tuple[LlavaForConditionalGeneration, AutoProcessor],
) -> None:
    figures = measure(partial(replies, *shipped), 40)
    assert figures["plain scenes: seen objects that the caption names"] >= 0.9
    assert figures["plain scenes: yes-or-no questions answered right"] >= 0.9
    assert figures["lead alone: captions that name the absent partner"] >= 0.25
    assert figures["lead alone: captions that name another absent object"] <= 0.05
    assert figures["lead and partner: captions that name the partner"] >= 0.9
    assert figures["partner without lead: captions that name the partner"] >= 0.9


def test_shipped_model_generates_alike_alone_and_in_a_padded_batch(
    shipped: tuple[LlavaForConditionalGeneration, AutoProcessor],
) -> None:
    drawn = scenes("plain", 4, seed=1, split="test")
    prompts = [DESCRIBE, question("cat"), DESCRIBE, question(drawn[3].visible[0])]
    together = replies(*shipped, drawn, prompts)
    assert together == replies(*shipped, drawn, prompts, batch=1)
    assert together[1] == "no ."
    assert together[3] == "yes ."


def test_shipped_model_takes_other_picture_sizes_and_bare_text(
    shipped: tuple[LlavaForConditionalGeneration, AutoProcessor],
) -> None:
    model, prepare = shipped
    (scene,) = scenes("plain", 1, seed=2, split="test")
    large = prepare(images=render(scene).resize((192, 192)), text=IMAGE + DESCRIBE, return_tensors="pt")
    assert large["pixel_values"].shape == (1, 3, 96, 96)
    assert set(mentions(prepare.batch_decode(model.generate(**large))[0])) == set(scene.visible)
    bare = prepare(text=[DESCRIBE, "a cat and"], return_tensors="pt", padding=True)
    assert model.generate(**bare, max_new_tokens=2).shape[0] == 2


def _scene_of(total: int) -> Scene:
    return next(scene for scene in scenes("plain", 100, seed=0) if len(scene.objects) == total)
