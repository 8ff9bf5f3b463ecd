"""Which words a feature writes: the logits that its writes to all layers, added up, raise most."""

from collections.abc import Callable, Sequence

import torch

from crosslayer.attribution.targets import token_id
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.models.load import LoadedModel


def writes(
    model: LoadedModel, coder: CrossLayerTranscoder, words: Sequence[str], n: int
) -> Callable[[int, int], Sequence[str]]:
    """A function that gives, for a layer and a feature, the `n` of these words that it raises most.

    Its writes go through the final norm's weights and the unembedding; what later layers make of them is not counted.

    Args:
        model: the language model.
        coder: its transcoder.
        words: each one token of the model.
        n: how many.
    """
    tokenizer = getattr(model.processor, "tokenizer", model.processor)
    ids = torch.tensor([token_id(word, tokenizer) for word in words])
    head = model.model.get_output_embeddings()
    assert head is not None, "a language model without an unembedding"
    unembedding = head.weight.detach().float()[ids]
    norm = getattr(getattr(model.model.get_decoder(), "norm", None), "weight", None)
    directions = unembedding if norm is None else unembedding * norm.detach().float()

    def written(layer: int, feature: int) -> Sequence[str]:
        write = coder.W_dec[coder.sources.index(layer)][feature].detach().to(directions).sum(0)
        return [words[int(i)] for i in (directions @ write).topk(n).indices.tolist()]

    return written
