"""Text sampled from the model itself: the data it was made for, where none is at hand."""

from typing import Any

import torch
from tqdm import tqdm

from crosslayer.data.examples import Example, Examples
from crosslayer.errors import UserError

MODEL_SAMPLES = "model-samples"
N_SAMPLES = 1024
LENGTH = 128
"""Tokens a sample at most, where no context is named."""
BATCH = 32


def model_samples(model: Any, n: int, length: int, seed: int) -> Examples:
    """Samples at temperature 1 from the begin token on, each until its end token or `length` tokens.

    Sampled when they are loaded, alike for the same numbers on the same machine.

    Args:
        model: a loaded model with its tokenizer.
        n: how many.
        length: tokens a sample at most.
        seed: of the sampling.

    Raises:
        UserError: when there is no model, or its tokenizer has neither begin nor end token to start from.
    """
    if model is None:
        raise UserError(f"{MODEL_SAMPLES}: needs the model to sample from; give model=")
    tokenizer = getattr(model.processor, "tokenizer", model.processor)
    begin = None if tokenizer is None else tokenizer.bos_token_id
    begin = getattr(tokenizer, "eos_token_id", None) if begin is None else begin
    if begin is None:
        raise UserError(f"{MODEL_SAMPLES}: this model's tokenizer has no begin or end token to start from")
    starts = tqdm(range(0, n, BATCH), desc="sample", unit="batch", delay=2, leave=False)
    drawn = [ids for start in starts for ids in _batch(model.model, begin, length, seed * 1_000_003 + start)][:n]
    return Examples(
        MODEL_SAMPLES,
        n,
        lambda i: Example(f"{MODEL_SAMPLES}[{i}]", "", form="text", tokens=drawn[i]),
    )


@torch.no_grad()
def _batch(model: Any, begin: int, length: int, seed: int) -> list[tuple[int, ...]]:
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends])}
    starts = torch.full((BATCH, 1), begin, device=model.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = model.generate(
            input_ids=starts,
            attention_mask=torch.ones_like(starts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_length=length,
            max_new_tokens=None,
        )
    return [_until_end(ids, ends) for ids in drawn.tolist()]


def _until_end(ids: list[int], ends: set[int | None]) -> tuple[int, ...]:
    """Up to and with the first end token that is not the start."""
    return tuple(ids[: next((place + 1 for place, id in enumerate(ids) if place and id in ends), len(ids))])
