"""Where the tokens of a forward pass stand in their prompts: padded on the left, cached, or being generated.

Axes: B prompts, P positions of the pass, D d_model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosslayer.models.hooks import before_forward, shadowing
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch
from crosslayer.replacement.where import Places, Where


class Passes:
    """Follows a model's forward passes; inside `followed`, `places` tells of the present one.

    Args:
        model: the language model.
        batch: the prompts that will be run, where their answers are given and not generated.
    """

    def __init__(self, model: LoadedModel, batch: Batch | None = None):
        self.model, self.batch = model, batch
        text = model.model.config.get_text_config()
        self.drops_positions = bool(getattr(text, "num_kv_shared_layers", 0))
        self.kwargs: dict[str, Any] = {}
        self._places: Places | None = None
        self._masks: dict[Where, Tensor] = {}
        self.past = 0
        self.generating, self.prompt = False, 0

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Inside, every forward pass is noted, and what `generate` adds to a prompt is its answer."""
        speaker: Any = self.model.speaker
        with (
            shadowing(speaker, "generate", partial(self._generate, speaker.generate)),
            before_forward(speaker, self._start),
        ):
            yield

    def _generate(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        self.generating, self.prompt = True, 0
        try:
            return original(*args, **kwargs)
        finally:
            self.generating = False

    def _start(self, kwargs: dict[str, Any]) -> None:
        """Note, before the cache grows, which positions a pass begins with."""
        if self.drops_positions:  # Gemma 4's late layers see only those whose logits are kept
            kwargs.pop("logits_to_keep", None)
        cache = kwargs.get("past_key_values")
        self.past = cache.get_seq_length() if cache is not None else 0
        self._places, self._masks = None, {}
        self.kwargs = {name: kwargs.get(name) for name in ("attention_mask", "position_ids", "input_ids")}

    def mask(self, where: Where, x: Float[Tensor, "B P D"]) -> Bool[Tensor, "B P"]:
        """Where in the present pass, whose stream is x; never where a prompt begins.

        Raises:
            UserError: where the pass does not show what is asked for.
        """
        if where not in self._masks:
            places = self.places(x)
            self._masks[where] = where.mask(places).to(x.device) & ~places.first.to(x.device)
        return self._masks[where].to(x.device)

    def places(self, x: Float[Tensor, "B P D"]) -> Places:
        """Of the present pass, whose stream is x."""
        if self._places is None:
            B, P = x.shape[:2]
            self._places = Places(self._position(B, P), self._image(B, P), self._answer(B, P))
        return self._places

    def _position(self, B: int, P: int) -> Tensor:
        mask, ids = self.kwargs["attention_mask"], self.kwargs["position_ids"]
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return ((mask.long().cumsum(1) * mask) - 1)[:, self.past : self.past + P]
        if ids is not None:
            return (ids.amax(0) if ids.dim() == 3 else ids).expand(B, P)  # of Qwen: time, height, width
        return torch.arange(self.past, self.past + P).expand(B, P)

    def _image(self, B: int, P: int) -> Tensor | None:
        ids, image_id = self.kwargs["input_ids"], getattr(self.model.model.config, "image_token_id", None)
        if image_id is None:
            return torch.zeros(B, P, dtype=torch.bool)
        return None if ids is None else ids == image_id

    def _answer(self, B: int, P: int) -> Tensor | None:
        if self.generating:
            self.prompt = self.prompt or self.past + P  # the first pass is the prompt
            return (torch.arange(self.past, self.past + P) >= self.prompt).expand(B, P)
        if self.batch is not None and self.batch.response.shape == (B, self.past + P):
            return self.batch.response[:, self.past :]
        return None
