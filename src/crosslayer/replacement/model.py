"""The replacement model: every MLP's write computed by a transcoder from the model's own, replaced, stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.coders.writes import Writes
from crosslayer.data.examples import Example
from crosslayer.errors import UserError
from crosslayer.models.hooks import before_forward, reading, replacing
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch, context_limit, prepare
from crosslayer.replacement.passes import Passes


class ReplacementModel:
    """A model whose MLPs are stood in for by a transcoder.

    At every forward pass, layer by layer, the features of a layer are computed from the replaced stream, what they
    write to later layers is kept, and each MLP's output is the sum of what all its sources wrote. A token's features
    depend on that token's stream alone, so the KV cache works as it is. A prompt's first position has no features: it
    gets its mean write (see `CrossLayerTranscoder.first_write`). The transcoder keeps its own precision, whatever the
    model's. The MLPs of its `kept_layers` stay.

    Raises:
        UserError: when the transcoder was trained on a model of another shape or at another site.
    """

    def __init__(self, model: LoadedModel, transcoder: CrossLayerTranscoder):
        check_match(transcoder, model.id, model.n_layers, model.d_model, model.sites.read)
        self.model = model
        self.transcoder = transcoder.place(model.device)

    @contextmanager
    def replaced(self, progress: float = 1.0) -> Iterator[None]:
        """Inside, `model.model` is the replacement model; afterwards, whatever happened, it is the original.

        `progress` (0 to 1) is that of a training, where the sparsity changes with it.
        """
        sites, passes = self.model.sites, Passes(self.model)
        writes = _Writes(self.transcoder, progress, passes)
        with (
            passes.followed(),
            before_forward(self.model.speaker, writes.start),
            reading(sites, writes.read),
            replacing(sites, writes.write, self.transcoder.kept_layers),
        ):
            yield

    @torch.no_grad()
    def logits(self, batch: Batch) -> Float[Tensor, "B P V"]:
        """Logits of the replacement model at every position."""
        with self.replaced():
            return self.model.model(**batch.inputs, use_cache=False).logits

    def generate(self, prompt: str, image: Image.Image | Path | str | None = None, **sampling: Any) -> str:
        """The replacement model's continuation of one prompt, with a picture or the path of one.

        `sampling` goes to Hugging Face's `generate`; greedy by default.
        """
        picture = Path(image) if isinstance(image, str) else image
        return self.generate_batch([Example("prompt", prompt, image=picture)], **sampling)[0]

    def generate_batch(self, examples: list[Example], **sampling: Any) -> list[str]:
        """Continuations of several prompts, padded on the left."""
        with self.replaced():
            return generate(self.model, examples, **sampling)


@torch.no_grad()
def generate(model: LoadedModel, examples: list[Example], **sampling: Any) -> list[str]:
    """The model's continuations of several prompts, as text; greedy unless `sampling` says otherwise."""
    return as_text(model, generate_tokens(model, examples, **sampling))


def as_text(model: LoadedModel, tokens: Tensor) -> list[str]:
    """Token ids [B, G] as text without special tokens."""
    tokenizer = getattr(model.processor, "tokenizer", model.processor)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def without_end(model: LoadedModel, tokens: Tensor) -> list[list[int]]:
    """Generated token ids [B, G] without the special ones, the end and padding, that follow the last word."""
    special = {*getattr(model.processor, "tokenizer", model.processor).all_special_ids}
    rows: list[list[int]] = tokens.tolist()
    lengths = [max((i + 1 for i, id in enumerate(row) if id not in special), default=0) for row in rows]
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


@torch.no_grad()
def generate_tokens(model: LoadedModel, examples: list[Example], **sampling: Any) -> Tensor:
    """Generated token ids [B, G]; a prompt that ended earlier is padded on the right."""
    return continuation(model, prepare(model.model, model.processor, [e.asked() for e in examples]), **sampling)


@torch.no_grad()
def continuation(model: LoadedModel, batch: Batch, **sampling: Any) -> Tensor:
    """What the model generates after prepared prompts, [B, G], no longer than its context holds.

    What ended earlier is padded on the right.
    """
    settings = {"do_sample": False, "max_new_tokens": 32, **sampling}
    room = context_limit(model.model) - batch.tokens.shape[1]
    settings["max_new_tokens"] = max(1, min(settings["max_new_tokens"], room))
    generated: Any = model.model.generate  # a mixin's method, which type checkers take for a tensor
    return generated(**batch.inputs, **settings)[:, batch.tokens.shape[1] :]


class _Writes:
    """What the sources of one forward pass have written so far, for the layers still to come."""

    def __init__(self, transcoder: CrossLayerTranscoder, progress: float, passes: Passes):
        self.transcoder, self.progress, self.passes = transcoder, progress, passes
        self.sources = set(transcoder.sources)
        self.collected: Writes | None = None
        self.like = torch.empty(0)
        self.first = torch.empty(0)

    def start(self, _: dict[str, Any]) -> None:
        """Forget the last forward pass."""
        self.collected = None

    def read(self, layer: int, x: Tensor) -> None:
        """Encode the stream [B, P, D] that `layer` reads and add what its features write."""
        coder, flat = self.transcoder, x.flatten(0, 1).to(self.transcoder.b_dec)
        self.like = x
        if self.collected is None:
            self.first = self.passes.places(x).first.flatten().to(flat.device)
            self.collected = coder.writes(len(flat))
        codes = coder.encode_layer(layer, flat, self.progress) if layer in self.sources else None
        coder.add_layer(self.collected, layer, codes, flat)

    def write(self, layer: int) -> Tensor:
        """The write [B, P, D] that stands in for the layer's MLP output."""
        assert self.collected is not None, "an MLP wrote before anything was read"
        ours = self.transcoder.write(self.collected, layer)
        write = torch.where(self.first[:, None], self.transcoder.first_write[layer], ours)
        return write.view_as(self.like).to(self.like)


def check_match(transcoder: CrossLayerTranscoder, model_id: str, n_layers: int, d_model: int, read: str) -> None:
    """Refuse a transcoder for a model of another shape, or for another site.

    Raises:
        UserError: naming both.
    """
    wanted = {"n_layers": n_layers, "d_model": d_model, "read": read}
    found = {
        "n_layers": transcoder.wiring.n_layers,
        "d_model": transcoder.d_model,
        "read": transcoder.provenance.read,
    }
    for name, value in wanted.items():
        if found[name] != value:
            raise UserError(
                f"the transcoder has {name} {found[name]}, the model {model_id} has {value}; "
                f"the transcoder was trained on {transcoder.provenance.model_id or 'another model'}"
            )
