"""Text that the model makes up: alike for the same seed, and distributed as the model says."""

import pytest
import torch

from crosslayer import UserError, load_data
from crosslayer.zoo.emoji_llava.architecture import WORDS

BOS, EOS = WORDS.index("<s>"), WORDS.index("</s>")


def test_samples_are_alike_for_the_same_seed(llama):
    one, again = (load_data("model-samples", model=llama, n=40, context=10) for _ in range(2))
    other = load_data("model-samples", model=llama, n=40, context=10, seed=1)
    assert [e.tokens for e in one] == [e.tokens for e in again]
    assert [e.tokens for e in one] != [e.tokens for e in other]
    assert [e.tokens for e in one[:5]] == [e.tokens for e in load_data("model-samples", model=llama, n=5, context=10)]


def test_samples_begin_with_the_begin_token_and_end_once(llama):
    for example in load_data("model-samples", model=llama, n=64, context=12):
        assert example.tokens[0] == BOS
        assert EOS not in example.tokens[:-1]
        assert len(example.tokens) == 12 or example.tokens[-1] == EOS


def test_first_words_are_as_likely_as_the_model_says(llama):
    data = load_data("model-samples", model=llama, n=4000, context=2)
    counts = torch.bincount(torch.tensor([e.tokens[1] for e in data]), minlength=len(WORDS)).double()
    with torch.no_grad():
        expected = llama.model(torch.tensor([[BOS]])).logits[0, -1].double().softmax(0)
    assert (counts / 4000 - expected).abs().max() < 4 * (expected * (1 - expected) / 4000).sqrt().max()


def test_sampling_leaves_the_random_state_alone(llama):
    torch.manual_seed(5)
    before = torch.rand(3)
    torch.manual_seed(5)
    load_data("model-samples", model=llama, n=3, context=5)
    assert torch.equal(torch.rand(3), before)


def test_samples_need_a_model():
    with pytest.raises(UserError, match="model-samples: needs the model to sample from; give model="):
        load_data("model-samples")
