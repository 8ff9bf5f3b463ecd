"""Time the trainer of Goreg12345/crosslayer-transcoder on one CPU thread; prints one JSON line.

    python benchmarks/peers/goreg.py --peer CHECKOUT --case F2048

Runs in the peer's own environment (lightning, torchmetrics, nnsight, wandb, einops). The peer's Lightning module of
its TopK recipe (`config/topk-clt.yaml`) does the work under Lightning's own trainer, in fp32.
"""

import sys
from pathlib import Path

import torch
from common import LAYERS, WIDTH, Case, Clock, Job, arguments, stream, time_peer

NAME = "Goreg12345/crosslayer-transcoder"


def prepare(checkout: Path, case: Case, clock: Clock) -> Job:
    """The peer's module with its auxiliary loss, which decodes every batch a second time."""
    sys.path.insert(0, str(checkout))
    import lightning
    from crosslayer_transcoder.model import clt, standardize
    from crosslayer_transcoder.model.clt_lightning import TopKCrossLayerTranscoderModule
    from crosslayer_transcoder.model.topk import PerLayerTopK

    sizes = {"d_acts": WIDTH, "d_features": case.features, "n_layers": LAYERS}
    model = clt.CrossLayerTranscoder(
        PerLayerTopK(k=case.k),
        clt.Encoder(**sizes),
        clt.CrosslayerDecoder(**sizes),
        standardize.DimensionwiseInputStandardizer(LAYERS, WIDTH),
        standardize.DimensionwiseOutputStandardizer(LAYERS, WIDTH),
    )
    module = TopKCrossLayerTranscoderModule(
        PerLayerTopK(k=512), model=model, learning_rate=1e-4, log_metrics_every=10**9, tokens_till_dead=500_000
    )
    trainer = lightning.Trainer(
        max_steps=10**6,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = (torch.stack([x, y], 1) for x, y in stream(case, clock))
    about = "topk a layer, AuxK 512 a layer, fused Adam, dimension-wise standardisers; not compiled, no metrics"
    return Job(lambda: trainer.fit(module, batches), model, about)


def main() -> None:
    """Parse the arguments, measure, print."""
    args = arguments(NAME).parse_args()
    time_peer(NAME, args, lambda case, clock: prepare(args.peer, case, clock), patches={})


if __name__ == "__main__":
    main()
