"""Time the trainer of curt-tigges/crosslayer-coding on one CPU thread; prints one JSON line.

    python benchmarks/peers/crosslayer_coding.py --peer CHECKOUT --case F2048 --activation topk

Runs in the peer's own environment (h5py, nnsight, datasets, wandb). The peer's `CLTTrainer.train` does the work.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import LAYERS, WIDTH, Case, Clock, Job, arguments, stream, time_peer
from torch import Tensor

NAME = "curt-tigges/crosslayer-coding"
PATCHES = {
    "store": "`create_activation_store` gives batches from memory; its own stores read a folder or a server",
    "evaluation": "the trainer evaluates at step 0, before the clock starts, and never again",
}


def batches(case: Case, clock: Clock) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """Batches by layer, as the peer's stores give them."""
    for x, y in stream(case, clock):
        yield dict(enumerate(x.unbind(1))), dict(enumerate(y.unbind(1)))


def prepare(checkout: Path, activation: str, case: Case, clock: Clock) -> Job:
    """The peer's trainer of one of its transcoders; its k counts over all layers."""
    sys.path.insert(0, str(checkout))
    from clt.config import CLTConfig, TrainingConfig
    from clt.training import trainer

    trainer.create_activation_store = lambda **_: batches(case, clock)
    k = LAYERS * case.k
    config = CLTConfig(
        num_features=case.features,
        num_layers=LAYERS,
        d_model=WIDTH,
        activation_fn=activation,
        batchtopk_k=k if activation == "batchtopk" else None,
        topk_k=k if activation == "topk" else None,
    )
    training = TrainingConfig(
        learning_rate=1e-4,
        training_steps=10**6,
        train_batch_size_tokens=case.tokens,
        normalization_method="none",
        activation_path="unused",
        activation_dtype="float32",
        eval_interval=10**9,
        checkpoint_interval=10**9,
        log_interval=10**9,
        apply_sparsity_penalty_to_batchtopk=False,
    )
    run = trainer.CLTTrainer(config, training, log_dir=tempfile.mkdtemp(), device="cpu")
    return Job(run.train, run.model, f"{activation}, AdamW; no evaluation, no logging")


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = arguments(NAME)
    parser.add_argument("--activation", choices=["jumprelu", "batchtopk", "topk"], default="jumprelu")
    args = parser.parse_args()
    time_peer(NAME, args, lambda case, clock: prepare(args.peer, args.activation, case, clock), PATCHES)


if __name__ == "__main__":
    main()
