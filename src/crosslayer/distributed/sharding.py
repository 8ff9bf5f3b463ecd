"""A coder over ranks: one's own share of it, the whole from all ranks, and what cannot be split."""

from typing import Any

import torch
from torch import Tensor

from crosslayer.coders.sharing import ByColumns, Sharing, axis_of, better
from crosslayer.coders.sparsity import GroupMax, Sparsity
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.team import ALONE, Team, share
from crosslayer.training.config import TrainConfig
from crosslayer.training.losses import FVU
from crosslayer.training.optimizers import Adam8bit, Muon


def parallelise(coder: CrossLayerTranscoder, team: Team, sparsity: Sparsity | None = None) -> CrossLayerTranscoder:
    """A coder of this process's share of a whole one, to be trained under a sparsity, or under the coder's own."""
    own = _like(coder, team, better(sparsity or coder.sparsity_at(1.0)))
    for name, tensor in _tensors(own).items():
        whole, axis = _tensors(coder)[name], axis_of(own.sharing, name)
        if axis is not None:
            held = share(team.features, whole.shape[axis])
            whole = whole.narrow(axis, held.start, len(held))
        tensor.data.copy_(whole)
    return own


@torch.no_grad()
def whole(coder: CrossLayerTranscoder) -> CrossLayerTranscoder:
    """The whole coder, on every rank, of what the ranks of its team hold."""
    features = coder.team.features
    if features.size == 1:
        return coder
    out = _like(coder, ALONE, type(coder.sharing))
    for name, tensor in _tensors(coder).items():
        axis = axis_of(coder.sharing, name)
        if axis is not None:
            parts = features.gather(tensor.detach().movedim(axis, 0).contiguous())
            tensor = torch.cat(parts).movedim(0, axis)
        _tensors(out)[name].data.copy_(tensor)
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
    by_columns = config.sparsity is None or better(config.sparsity) is ByColumns
    if by_columns and d_model % n_feature:
        raise UserError(
            f"d_model is {d_model}, which {n_feature} feature ranks cannot share evenly; choose a divisor of it"
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
        "an end-to-end loss runs through every layer": not isinstance(config.loss, FVU),
    }
    for what, asked in refused.items():
        if asked:
            raise UserError(f"{what}, which cannot be split over {n_feature} feature ranks; leave out --feature-ranks")


def _like(coder: CrossLayerTranscoder, team: Team, sharing: type[Sharing]) -> CrossLayerTranscoder:
    """A coder of the same architecture and state, still zero, with the share of another place in a team."""
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
        sharing,
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
