"""The model's own answers to a data set, as JSON lines that are a data set again."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from crosslayer.data.examples import Example, Examples, apart, digest
from crosslayer.data.skipped import Skipped
from crosslayer.distributed.crew import ALONE, Crew
from crosslayer.errors import UserError
from crosslayer.files import append_line, atomic_path, write_text
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import prepare_good
from crosslayer.replacement.model import as_text, continuation, without_end

UNFINISHED = ".unfinished"
"""How the file of answers ends while there are more to come: its settings, then a line for each batch."""


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How answers are generated."""

    max_new_tokens: int = 128
    """Tokens of an answer at most."""
    temperature: float = 0.0
    """0 is greedy; above it, sampling."""
    seed: int = 0
    """Of the sampling."""
    batch_prompts: int = 16
    """Prompts answered together."""

    def __post_init__(self):
        for name in ("max_new_tokens", "batch_prompts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; choose at least 1")
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; choose 0 for greedy or more")


def respond(
    model: LoadedModel,
    data: Examples,
    out: str | Path,
    settings: Answering | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    crew: Crew = ALONE,
) -> int:
    """Let a model answer every prompt of a data set; bad ones are skipped, and listed beside the answers.

    Args:
        model: whose answers they are.
        data: prompts, with pictures or without; responses that it has are not looked at.
        out: JSON lines of `id`, `image`, `prompt`, `response` and its `token_ids`, and of `history` and `form` where
            there is more to a prompt. Pictures that are in no file of their own are saved in a folder beside it.
        settings: greedy answers of up to 128 tokens, when left out.
        resume: go on after the last whole batch; the result is that of an unbroken run.
        overwrite: replace what is there.
        crew: the processes that share the work; the first of them writes, and all return when it is done.

    Returns:
        How many answers there are.

    Raises:
        UserError: when there is such a file already, nothing or something else to resume, or too many prompts are bad.
    """
    out, settings = Path(out), settings or Answering()
    header = {"model": model.id, "revision": model.revision, "data": data.name, "n": len(data), **vars(settings)}
    crew.agree(lambda: {**header, "digest": digest(data)})
    start = partial(_start, out, header, data.skipped, resume, overwrite)
    done, asked = crew.first(start), replace(data, make=lambda i: data.make(i).asked())
    batches = [
        range(start, min(start + settings.batch_prompts, len(data)))
        for start in range(done * settings.batch_prompts, len(data), settings.batch_prompts)
    ]
    answers = crew.map(lambda i: _answers(model, asked, batches[i], out, settings, crew), len(batches))
    bar = tqdm(total=len(data), initial=len(data) - sum(map(len, batches)), unit="prompt", desc="respond")
    with bar:
        try:
            for numbers, answered in zip(batches, answers, strict=True):
                if crew.leads:
                    data.skipped.hear(answered["looks"])
                    append_line(_unfinished(out), json.dumps(answered["lines"], ensure_ascii=False))
                bar.update(len(numbers))
        except KeyboardInterrupt:
            at = f"{bar.n:,} of {len(data):,} prompts"
            raise KeyboardInterrupt(f"stopped after {at}; the same command with --resume goes on from there") from None
    return crew.first(lambda: _finish(_unfinished(out), out))


def _unfinished(out: Path) -> Path:
    return out.with_name(out.name + UNFINISHED)


def _start(out: Path, header: dict[str, Any], skipped: Skipped, resume: bool, overwrite: bool) -> int:
    """How many batches are answered already; the files are ready for more."""
    unfinished = _unfinished(out)
    done = _kept(unfinished, header) if resume else _new(out, unfinished, header, overwrite)
    skipped.list_in(out.with_suffix(".skipped.jsonl"), resume=resume)
    return done


def _new(out: Path, unfinished: Path, header: dict[str, Any], overwrite: bool) -> int:
    if out.is_dir():
        raise UserError(f"{out}: is a folder; choose a file")
    if out.exists() and not overwrite:
        raise UserError(f"{out}: already exists; choose another file or add --overwrite")
    if unfinished.exists() and not overwrite:
        raise UserError(f"{unfinished}: holds unfinished answers; go on with --resume or start anew with --overwrite")
    write_text(unfinished, json.dumps(header, ensure_ascii=False) + "\n")
    return 0


def _kept(unfinished: Path, header: dict[str, Any]) -> int:
    """How many batches are answered; half a line that a killed run left is dropped."""
    if not unfinished.is_file():
        raise UserError(f"{unfinished}: no such file to resume from; it is finished, or start without --resume")
    lines = [line for line in _lines(unfinished) if line.endswith("\n")]
    kept = json.loads(lines[0])
    for key, value in header.items():
        if kept[key] != value:
            raise UserError(
                f"{unfinished}: was started with {key} = {kept[key]}, now {value} is asked for; resume with the same "
                "settings or start anew with --overwrite"
            )
    write_text(unfinished, "".join(lines))
    return len(lines) - 1


def _answers(
    model: LoadedModel, asked: Sequence[Example], numbers: range, out: Path, settings: Answering, crew: Crew
) -> dict[str, Any]:
    """The lines of one batch, and what was seen of bad rows."""
    asked, notes = apart(asked, crew)
    batch, good = prepare_good(model.model, model.processor, asked, numbers)
    if batch is None:
        return {"lines": [], "looks": notes.looks}
    sampling: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens}
    if settings.temperature:
        sampling |= {"do_sample": True, "temperature": settings.temperature}
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed * 1_000_003 + numbers.start)
        said = continuation(model, batch, **sampling)
    lines = zip(good, as_text(model, said), without_end(model, said), strict=True)
    written = [_line(model, number, asked[number], text, ids, out) for number, text, ids in lines]
    return {"lines": written, "looks": notes.looks}


def _line(
    model: LoadedModel, number: int, example: Example, response: str, ids: list[int], out: Path
) -> dict[str, Any]:
    prompt = example.prompt
    if example.tokens is not None:
        prompt = as_text(model, torch.tensor([example.tokens]))[0]
    line = {"id": example.id, "image": _image(number, example, out), "prompt": prompt, "response": response}
    line |= {"token_ids": ids}
    history = {"history": example.history} if example.history else {}
    return line | history | ({} if example.form == "chat" else {"form": example.form})


def _image(number: int, example: Example, out: Path) -> str | None:
    """Where the picture is: its own file, or one beside the answers, named from there."""
    if isinstance(example.image, Path):
        return str(example.image.resolve())
    picture = example.picture()
    if picture is None:
        return None
    path = out.with_name(f"{out.stem}_images") / f"{number:06d}.png"
    with atomic_path(path) as temporary:
        picture.save(temporary, format="png")
    return path.relative_to(out.parent).as_posix()


def _finish(unfinished: Path, out: Path) -> int:
    """Put the answers where they belong, a line each."""
    n = 0
    with atomic_path(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for batch in islice(_lines(unfinished), 1, None):
            for line in json.loads(batch):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                n += 1
    unfinished.unlink()
    return n


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="\n") as file:
        yield from file
