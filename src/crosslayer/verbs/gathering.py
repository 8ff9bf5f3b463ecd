"""Verbs that gather: a model's answers and activations."""

import re
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from crosslayer.activations.manifest import MANIFEST
from crosslayer.activations.store import Store
from crosslayer.activations.to_store import capture_to_store
from crosslayer.activations.writer import SHARD_BYTES
from crosslayer.answering import UNFINISHED, Answering
from crosslayer.answering import respond as run_respond
from crosslayer.data.load import read_data
from crosslayer.data.reading import Reading
from crosslayer.distributed.joining import crew
from crosslayer.errors import UserError
from crosslayer.model_options import AS_IT_IS
from crosslayer.report import store_table, training_from
from crosslayer.verbs.arguments import (
    Data,
    HowRead,
    Loading,
    Model,
    Read,
    print_skipped,
)


def respond(
    model: Model,
    data: Data,
    out: Annotated[Path, arg(help="File of JSON lines: id, image, prompt, response; it can be DATA again.")],
    reading: HowRead = Reading(),  # noqa: B008
    prompts: Annotated[int | None, arg(help="How many examples to answer at most; all by default.")] = None,
    answering: Annotated[Answering, arg(name="")] = Answering(),  # noqa: B008
    resume: Annotated[bool, arg(help="Go on after an interruption, to the answers of an unbroken run.")] = False,
    overwrite: Annotated[bool, arg(help="Replace an earlier file of answers.")] = False,
    loading: Loading = AS_IT_IS,
) -> None:
    """Let a model answer every prompt of DATA, greedily by default, and keep prompts, images and answers."""
    loaded = loading.load(model)
    examples = read_data(data, reading, loaded, n=prompts)
    here = crew()
    resume = resume or (here.restarted and out.with_name(out.name + UNFINISHED).exists())
    n = run_respond(loaded, examples, out, answering, resume=resume, overwrite=overwrite, crew=here)
    here.dismiss()
    print(f"{out}: {n:,} answers\nnext: crosslayer train {model} {out} --out RUN")
    print_skipped(examples)


def capture(
    model: Model,
    data: Data,
    out: Annotated[Path, arg(help="Folder of the store.")],
    reading: HowRead = Reading(),  # noqa: B008
    tokens: Annotated[int | None, arg(help="Tokens to keep.")] = None,
    prompts: Annotated[int | None, arg(help="Prompts to keep all tokens of; by default all of DATA once.")] = None,
    store_dtype: Annotated[str, arg(help="bf16, fp32, or int8 with a scale for each token and layer.")] = "bf16",
    layers: Annotated[str | None, arg(help="Layers to keep, as in 8-15; training needs all, the default.")] = None,
    seed: Annotated[int, arg(help="Seed of the order of the data; train with the same to train as on the stream.")] = 0,
    shard_mib: Annotated[int, arg(help="Size that a file does not pass, in MiB.")] = SHARD_BYTES // 2**20,
    read: Read = "resid",
    resume: Annotated[bool, arg(help="Go on after the last whole shard in --out.")] = False,
    overwrite: Annotated[bool, arg(help="Replace the store that --out holds.")] = False,
    loading: Loading = AS_IT_IS,
) -> None:
    """Keep what a model's MLPs read and write on disk; the room needed is said first; resumable."""
    loaded = loading.load(model, read)
    examples = read_data(data, reading, loaded)
    here = crew()
    resume = resume or (here.restarted and (out / MANIFEST).exists())
    store = capture_to_store(
        loaded,
        examples,
        out,
        tokens=tokens,
        prompts=prompts,
        dtype=store_dtype,
        layers=None if layers is None else _layers(layers),
        seed=seed,
        shard_bytes=shard_mib * 2**20,
        resume=resume,
        overwrite=overwrite,
        crew=here,
    )
    here.dismiss()
    print(store_table(store) + training_from(store, model))
    print_skipped(examples)


def store(
    action: Annotated[Positional[Literal["info", "verify"]], arg(metavar="{info,verify}", help="What to do.")],
    store: Annotated[Positional[Path], arg(metavar="STORE", help="Folder that `crosslayer capture` wrote.")],
) -> None:
    """Print what a store of activations holds (info), or compare every shard with its checksum (verify)."""
    found = Store(store)
    if action == "info":
        print(store_table(found))
    else:
        found.verify()
        print(f"{store}: all {len(found.manifest.shards):,} shards are as they were written")


def _layers(text: str) -> range:
    """`8-15` or `8`, as a range."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match:
        raise UserError(f"layers are {text!r}; give them as in 8-15")
    return range(int(match[1]), int(match[2] or match[1]) + 1)
