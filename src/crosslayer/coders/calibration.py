"""From TopK to JumpReLU: a fixed threshold per feature, so that inference needs neither a batch nor all layers."""

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.coders.sparsity import Penalised
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.team import Group, count

BATCH = 1024
"""Tokens encoded at a time."""


@torch.no_grad()
def calibrate(coder: CrossLayerTranscoder, x: Float[Tensor, "N L D"]) -> CrossLayerTranscoder:
    """Convert `coder`, in place, to JumpReLU; processes that share its features must look at the same x.

    ReLU and JumpReLU keep the thresholds that they have. The others get some that make the same features active per
    layer on the raw tokens `x`: BatchTopK's from its cut, for the rest a feature's threshold lies where the feature
    fires on as many tokens as it was selected for, and one that was never selected gets the layer's typical threshold,
    in units of activation x decoder norm. One factor a layer then makes the layer's L0 exactly that of the selection.
    """
    if coder.thresholds is not None:
        return coder
    learned = coder.sparsity.thresholds(coder)
    if learned is not None and isinstance(coder.sparsity, Penalised):
        return coder.with_thresholds(learned)
    counts, norms, x_scaled = _selections(coder, x), coder.decoder_norms(), coder.scaled(x)
    rows = []
    for i, source in enumerate(coder.sources):
        pre = coder.layer_preactivations(i, x_scaled[:, source])
        features = coder.team.features
        threshold = _fill(_rate_thresholds(pre, counts[i]), norms[i], features) if learned is None else learned[i]
        rows.append(threshold * _factor(pre, threshold, count(features, int(counts[i].sum())), features))
    return coder.with_thresholds(torch.stack(rows))


def _selections(coder: CrossLayerTranscoder, x: Tensor) -> Tensor:
    """[S, F] on how many tokens TopK selects each feature."""
    parts = [coder.encode_for_training(part, progress=1.0).codes for part in x.split(BATCH)]
    return torch.stack([torch.stack([codes.counts() for codes in part]) for part in parts]).sum(0)


def _rate_thresholds(pre: Tensor, counts: Tensor) -> Tensor:
    """[F] the value above which a feature's pre-activations [N, F] lie `counts` times; NaN where that is never."""
    thresholds = pre.new_full((pre.shape[1],), torch.nan)
    fired = counts.nonzero().squeeze(1)
    ranked = pre[:, fired].T.sort(1, descending=True).values
    place = counts[fired].long().clamp(max=len(pre) - 1)
    thresholds[fired] = ranked.gather(1, place[:, None]).squeeze(1).clamp_min(1e-6)
    return thresholds


def _fill(thresholds: Tensor, norms: Tensor, features: Group) -> Tensor:
    """Thresholds for features never selected: the layer's median of threshold x norm; infinite where none was."""
    typical = torch.cat(features.gather(thresholds * norms)).nanmedian()
    return thresholds.where(~thresholds.isnan(), (typical / norms).nan_to_num(nan=torch.inf))


def _factor(pre: Tensor, threshold: Tensor, n_wanted: int, features: Group) -> Tensor:
    """The factor on all thresholds above which exactly `n_wanted` pairs lie, halfway between two of them."""
    ratios = (pre / threshold).flatten()
    if not 0 < n_wanted < count(features, len(ratios)):
        return ratios.new_tensor(1.0)
    largest = torch.cat(features.gather(ratios.topk(min(n_wanted + 1, len(ratios))).values))
    return largest.topk(n_wanted + 1).values[-2:].mean().clamp_min(1e-6)
