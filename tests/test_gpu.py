"""A training on a GPU is that on a CPU: its kernels on a CPU always, the device itself where there is one."""

from dataclasses import replace

import pytest
import torch

from crosslayer import (
    BatchTopK,
    GroupMax,
    JointTopK,
    JumpReLU,
    LowRank,
    ReLU,
    SourceTied,
    TargetTied,
    TopK,
    TrainConfig,
    Wiring,
)
from crosslayer.activations.record import Activations
from crosslayer.coders import kernels, products
from crosslayer.coders.sparsity import topk
from crosslayer.training.scales import Scales, estimate_scales
from crosslayer.training.trainer import Trainer
from making import random_activations

L, D, F = 3, 8, 128
SETTLED = {"anneal_share": 0.0}  # from the start as sparse as at the end
SPARSITIES = [JointTopK(12, **SETTLED), BatchTopK(12, **SETTLED), TopK(4, **SETTLED), GroupMax(8), JumpReLU(), ReLU()]
BANKS = [SourceTied(scale=True), TargetTied(topk_coalesced=6), LowRank(2)]
VARIANTS = [{"sparsity": s} for s in SPARSITIES] + [{"decoder": d} for d in BANKS] + [{"skip": Wiring.full(L)}]

variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def on(device: str, record):
    """A record of tensors, elsewhere."""
    return replace(record, **{name: value.to(device) for name, value in vars(record).items()})


def trained(variant: dict, device: str = "cpu", precision: str = "fp32") -> dict[str, torch.Tensor]:
    """The state after a few steps with dead features, on the CPU."""
    config = TrainConfig(
        wiring=Wiring.full(L), d_transcoder=F, tokens=100_000, learning_rate=1e-3, dead_density=0.2,
        precision=precision, **variant,
    )  # fmt: skip
    scales: Scales = on(device, estimate_scales(random_activations(500, L, D, seed=99)))
    trainer = Trainer(config, scales)
    for seed in range(4):
        batch: Activations = on(device, random_activations(64, L, D, seed=seed))
        trainer.step(batch)
    return {name: tensor.cpu() for name, tensor in trainer.state()[0].items()}


def assert_close(found: dict, wanted: dict, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@variants
def test_the_kernels_of_a_gpu_train_the_same_on_a_cpu(variant, monkeypatch):
    wanted = trained(variant)
    monkeypatch.setattr(topk, "WITH_NUMPY", "nothing")
    monkeypatch.setattr(products, "_by_onednn", lambda x: False)
    for table in (kernels.SUMS, kernels.DOTS, kernels.DENSE_FROM):
        monkeypatch.setitem(table, "cpu", table["cuda"])
    assert_close(trained(variant), wanted, 1e-4)


@needs_a_gpu
@variants
def test_a_gpu_trains_the_same_as_a_cpu(variant):
    assert_close(trained(variant, "cuda"), trained(variant), 1e-3)


@needs_a_gpu
def test_a_gpu_trains_about_the_same_in_bf16():
    assert_close(trained({}, "cuda", "bf16"), trained({}), 5e-2)
