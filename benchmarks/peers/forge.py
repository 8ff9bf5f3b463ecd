"""Time the trainer of LLM-Interp/CLT-Forge on one CPU thread; prints one JSON line.

    python benchmarks/peers/forge.py --peer CHECKOUT --case F2048

Runs in the peer's own environment (transformer-lens below 3, sae-lens below 6.12, wandb, zstandard). The peer's
`CLTTrainer.fit` does the work.
"""

import sys
from pathlib import Path

from common import LAYERS, WIDTH, Case, Clock, Job, arguments, stream, time_peer

NAME = "LLM-Interp/CLT-Forge"
PATCHES = {
    "b_enc": "the encoder biases are not set from data, as from a pretrained start: the rate that they are set for, "
    "10,000 active features over F, is no rate for an F below 10,000 (an index error)",
}


def prepare(checkout: Path, case: Case, clock: Clock) -> Job:
    """The peer's trainer of a JumpReLU transcoder, which is all that it has."""
    sys.path.insert(0, str(checkout / "src"))
    from clt_forge.clt import CLT
    from clt_forge.config import CLTConfig, CLTTrainingRunnerConfig
    from clt_forge.training.clt_trainer import CLTTrainer

    config = CLTTrainingRunnerConfig(
        device="cpu",
        distributed_setup="None",
        log_to_wandb=False,
        n_checkpoints=0,
        d_in=WIDTH,
        d_latent=case.features,
        train_batch_size_tokens=case.tokens,
        total_training_tokens=10**9,
        from_pretrained_path="skips the biases' initialisation",
    )
    model = CLT(config.create_sub_config(CLTConfig, n_layers=LAYERS))
    trainer = CLTTrainer(model, stream(case, clock), config, save_checkpoint_fn=lambda **_: None)
    return Job(trainer.fit, model, "JumpReLU with tanh and dead-feature penalties, Adam, gradient clipping; no metrics")


def main() -> None:
    """Parse the arguments, measure, print."""
    args = arguments(NAME).parse_args()
    time_peer(NAME, args, lambda case, clock: prepare(args.peer, case, clock), PATCHES)


if __name__ == "__main__":
    main()
