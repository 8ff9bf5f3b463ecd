"""What tests are made of: small random transcoders, activations and prompts, and a dense definition in numpy."""

import resource
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from hypothesis import strategies as st

from crosslayer import AuxK, CrossLayerTranscoder, Example, JointTopK, Wiring
from crosslayer.activations.record import Activations
from crosslayer.coders.sparsity import Encoded, JumpReLU, Sparsity, TopK
from crosslayer.coders.transcoder import Provenance

TEXTS = (
    "a cat and a dog .",
    "is there a banana ? yes",
    "the picture is a tiger , a lion and a bus .",
    "there is a star , a heart , a moon , a crown and a gift in the picture .",
    "no",
)
"""Prompts of different lengths in the words of the tiny models."""


def text_examples(n: int) -> list[Example]:
    return [Example(f"text-{i}", f"{TEXTS[i % len(TEXTS)]} a {'cat' if i % 2 else 'dog'} is") for i in range(n)]


class Watched(Sequence[Example]):
    """Examples that call `event` when the n-th of them is asked for."""

    def __init__(self, examples: list[Example], at: int, event: Callable[[], None]):
        self.examples, self.left, self.event = examples, at, event

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            self.event()
        return self.examples[index]


@st.composite
def wirings(draw, max_layers: int = 40) -> Wiring:
    n_layers = draw(st.integers(1, max_layers))
    first_target = draw(st.integers(0, 1)) if n_layers > 1 else 0
    return Wiring(n_layers, draw(st.integers(1, n_layers - first_target)), first_target)


def random_coder(wiring: Wiring, sparsity: Sparsity | None = None, *, D=6, F=10, seed=0) -> CrossLayerTranscoder:
    """A transcoder in which every parameter is random, biases and thresholds too."""
    torch.manual_seed(seed)
    coder = CrossLayerTranscoder(wiring, D, F, sparsity or JointTopK(8)).initialise(seed)
    for parameter in coder.parameters():
        parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    coder.first_write.normal_()
    return coder


def random_activations(n: int, L: int, D: int, *, seed: int = 0, first_every: int = 8) -> Activations:
    """Tokens of a residual network of fixed random ReLU layers; every `first_every`-th token begins a prompt."""
    generator, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(12345)
    stream, reads, writes = torch.randn(n, D, generator=generator), [], []
    for _ in range(L):
        reads.append(stream)
        writes.append((stream @ torch.randn(D, D, generator=fixed) / D**0.5).relu() + 0.5)
        stream = stream + writes[-1]
    places = torch.arange(n)
    return Activations(
        x=torch.stack(reads, 1),
        y=torch.stack(writes, 1),
        image=places % 3 == 0,
        position=places % first_every,
        sample=places // first_every,
        token=places % 7,
    )


def finished_coder(wiring: Wiring, *, D=32, F=24, seed=0, read="resid") -> CrossLayerTranscoder:
    """A random transcoder as after training: fixed thresholds, and a provenance."""
    coder = random_coder(wiring, D=D, F=F, seed=seed)
    coder.with_thresholds(torch.rand(len(coder.sources), F))
    coder.provenance = Provenance("tiny", read=read)
    return coder.requires_grad_(False)


def traces(model: torch.nn.Module) -> list:
    """All that a hook could leave behind on a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [(name, dict(getattr(m, kind))) for name, m in model.named_modules() for kind in kinds] + [
        (name, vars(m)["forward"]) for name, m in model.named_modules() if "forward" in vars(m)
    ]


@contextmanager
def no_file_larger_than(n_bytes: int):
    """As a full disk does, the operating system refuses to write on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def dense_acts(coder: CrossLayerTranscoder, x: np.ndarray) -> list[np.ndarray]:
    """Activations [N, F] of every source, from the definition of each sparsity, in float64."""
    norms = [np.sqrt((array(W) ** 2).sum((1, 2))) for W in coder.W_dec]
    encoders = zip(coder.sources, coder.W_enc, coder.b_enc, strict=True)
    pre = [x[:, s] @ array(W).T + array(b) for s, W, b in encoders]
    acts = [np.maximum(p, 0) for p in pre]
    scores = np.concatenate([a * n for a, n in zip(acts, norms, strict=True)], 1)
    if isinstance(coder.sparsity, JointTopK):
        masks = np.split(_largest(scores, coder.sparsity.k), len(pre), axis=1)
    elif isinstance(coder.sparsity, TopK):
        masks = [_largest(a, coder.sparsity.k) for a in acts]
    elif isinstance(coder.sparsity, JumpReLU):
        thresholds = coder.thresholds if coder.thresholds is not None else [t.exp() for t in coder.log_threshold]
        masks = [p > array(t) for p, t in zip(pre, thresholds, strict=True)]
    else:
        masks = [np.ones_like(p, bool) for p in pre]
    return [a * m for a, m in zip(acts, masks, strict=True)]


def dense_writes(coder: CrossLayerTranscoder, acts: list[np.ndarray]) -> np.ndarray:
    """y_t = b_dec[t] + the sum over sources s of t of a_s W_dec[s -> t], [N, L, D] in float64."""
    wiring, b_dec = coder.wiring, array(coder.b_dec)
    y = np.repeat(b_dec[None], len(acts[0]), 0)
    for t in range(wiring.n_layers):
        for i, s in enumerate(coder.sources):
            first, last = s + wiring.first_target, s + wiring.first_target + wiring.span
            if first <= t < last:
                y[:, t] += acts[i] @ array(coder.W_dec[i])[:, t - first]
    return y


def auxk_loss(auxk: AuxK, coder: CrossLayerTranscoder, encoded: Encoded, residual: torch.Tensor, dead: torch.Tensor):
    """The auxiliary loss of a batch, beside whatever its codes write; 0 where there is none."""
    codes = auxk.codes(coder, encoded, dead)
    return auxk.loss(coder.decode_beside(encoded.codes, encoded.x, codes)[1], residual) if codes else 0.0


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def _largest(scores: np.ndarray, k: int) -> np.ndarray:
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, np.argsort(-scores, axis=1)[:, :k], True, axis=1)
    return mask
