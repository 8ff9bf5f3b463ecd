"""The features of a coder over ranks: one's own rows of it, the whole from all ranks, and what cannot be split."""

from typing import Any

import torch
from torch import Tensor

from crosslayer.coders.sparsity import GroupMax
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.team import ALONE, Team
from crosslayer.training.config import TrainConfig
from crosslayer.training.losses import FVU
from crosslayer.training.optimizers import Adam8bit, Muon


def parallelise(coder: CrossLayerTranscoder, team: Team) -> CrossLayerTranscoder:
    """A coder of this process's rows of a whole one."""
    own = _like(coder, team)
    rows = slice(own.held.start, own.held.stop)
    for name, tensor in _tensors(own).items():
        whole = _tensors(coder)[name]
        tensor.data.copy_(
            whole if tensor.shape == whole.shape else whole[rows] if name != "thresholds" else whole[:, rows]
        )
    return own


@torch.no_grad()
def whole(coder: CrossLayerTranscoder) -> CrossLayerTranscoder:
    """The whole coder, on every rank, of what the ranks of its team hold."""
    features = coder.team.features
    if features.size == 1:
        return coder
    out = _like(coder, ALONE)
    for name, tensor in _tensors(coder).items():
        target = _tensors(out)[name]
        if target.shape == tensor.shape:
            target.data.copy_(tensor)
        else:
            axis = 1 if name == "thresholds" else 0
            parts = features.gather(tensor.detach().transpose(0, axis).contiguous())
            target.data.copy_(torch.cat(parts).transpose(0, axis))
    return out


def check_shares(config: TrainConfig, d_model: int, n_feature: int) -> None:
    """Refuse what cannot be split over so many ranks.

    Raises:
        UserError: naming it, and what to do.
    """
    F = config.width(d_model)
    if F % n_feature:
        near = max(n_feature, round(F / n_feature) * n_feature)
        raise UserError(
            f"d_transcoder is {F}, which {n_feature} feature ranks cannot share evenly; "
            f"the nearest that they can is {near}"
        )
    if n_feature == 1:
        return
    sparsity: Any = config.sparsity
    if isinstance(sparsity, GroupMax) and sparsity.k % n_feature:
        raise UserError(
            f"groupmax has k {sparsity.k} groups, which {n_feature} feature ranks cannot share evenly; "
            f"choose a multiple of {n_feature}"
        )
    refused = {
        "optimizer muon works on whole matrices": isinstance(config.optimizer, Muon),
        "optimizer adam-8bit scales blocks of moments": isinstance(config.optimizer, Adam8bit),
        "topk_coalesced chooses among all features of a token": bool(getattr(config.decoder, "topk_coalesced", None)),
        "an end-to-end loss runs through every layer": not isinstance(config.loss, FVU),
    }
    for what, asked in refused.items():
        if asked:
            raise UserError(f"{what}, which cannot be split over {n_feature} feature ranks; leave out --feature-ranks")


def _like(coder: CrossLayerTranscoder, team: Team) -> CrossLayerTranscoder:
    """A coder of the same architecture and state, still zero, with the rows of another place in a team."""
    out = CrossLayerTranscoder(
        coder.wiring,
        coder.d_model,
        coder.d_transcoder,
        coder.sparsity,
        coder.decoder.settings,
        coder.skip,
        coder.input_norm,
        coder.kept_layers,
        team,
    )
    out = out.to(coder.b_dec.device, coder.b_dec.dtype).requires_grad_(coder.b_dec.requires_grad).train(coder.training)
    out.provenance = coder.provenance
    if len(coder.log_threshold):
        out.learn_thresholds()
    if coder.thresholds is not None:
        out.thresholds = coder.thresholds.new_zeros(len(out.sources), len(out.held))
    for name in ("input_scale", "output_scale"):
        scale = getattr(coder, name)
        setattr(out, name, None if scale is None else scale.clone())
    return out


def _tensors(coder: CrossLayerTranscoder) -> dict[str, Tensor]:
    return {**dict(coder.named_parameters()), **dict(coder.named_buffers())}
