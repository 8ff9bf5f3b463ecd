"""Time the trainer of OpenMOSS/Language-Model-SAEs (`llamascopium`) on one CPU thread; prints one JSON line.

    python benchmarks/peers/openmoss.py --peer CHECKOUT --case F2048 --decode csr

Runs in the peer's own environment: what its pyproject.toml names, with transformer-lens below 3. The peer's
`Trainer.fit` does the work.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from common import LAYERS, WIDTH, Case, Clock, Job, arguments, stream, time_peer
from torch import Tensor

NAME = "OpenMOSS/Language-Model-SAEs"
READS, WRITES = [f"in.{layer}" for layer in range(LAYERS)], [f"out.{layer}" for layer in range(LAYERS)]


def batches(case: Case, clock: Clock) -> Iterator[dict[str, Tensor]]:
    """Batches under the names of the peer's hook points; every token counts."""
    tokens, mask = torch.zeros(case.tokens, dtype=torch.long), torch.ones(case.tokens, dtype=torch.bool)
    for x, y in stream(case, clock):
        activations = [*zip(READS, x.unbind(1), strict=True), *zip(WRITES, y.unbind(1), strict=True)]
        yield {"tokens": tokens, "mask": mask, **dict(activations)}


def prepare(checkout: Path, decode: str, case: Case, clock: Clock) -> Job:
    """The peer's trainer of a TopK transcoder."""
    sys.path.insert(0, str(checkout / "src"))
    from llamascopium.models.clt import CLTConfig, CrossLayerTranscoder
    from llamascopium.trainer import Trainer, TrainerConfig

    config = CLTConfig(
        d_model=WIDTH,
        expansion_factor=case.features / WIDTH,
        act_fn="topk",
        top_k=case.k,
        hook_points_in=READS,
        hook_points_out=WRITES,
        decode_with_csr=decode == "csr",
        norm_activation="inference",
        sparsity_include_decoder_norm=False,
    )
    model = CrossLayerTranscoder(config)
    model.init_parameters()
    settings = TrainerConfig(
        k_warmup_steps=0,
        amp_dtype=torch.float32,
        skip_metrics_calculation=True,
        total_training_tokens=10**9,
        n_checkpoints=0,
        exp_result_path=tempfile.mkdtemp(),
    )
    about = f"topk a layer, {decode} decode, Adam foreach; no decoder norms, no AuxK, no metrics"
    return Job(lambda: Trainer(settings).fit(model, batches(case, clock)), model, about)


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = arguments(NAME)
    parser.add_argument("--decode", choices=["csr", "dense"], default="csr", help="products of sparse or dense codes")
    args = parser.parse_args()
    time_peer(NAME, args, lambda case, clock: prepare(args.peer, args.decode, case, clock), patches={})


if __name__ == "__main__":
    main()
