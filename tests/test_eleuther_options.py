"""EleutherAI's command lines in our words."""

import pytest

from crosslayer import UserError
from crosslayer.eleuther_options import translate

OURS = ["MODEL", "DATA", "--out", "run", "--tokens", "5"]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("", ""),
        ("--cross_layer 16", "--span 16"),
        ("--cross-layer=16", "--span 16"),
        ("--cross_layer 0", "--span 1"),
        ("--coalesce_topk none", ""),
        ("--coalesce_topk per-layer", ""),
        ("--coalesce_topk concat", "--decoder target-tied"),
        ("--per_source_tied True", "--decoder source-tied"),
        ("--per_source_tied True --secondary_target_tied True", "--decoder source-and-target-tied"),
        ("--coalesce_topk concat --topk_coalesced True --k 8", "--k 8 --decoder target-tied --topk-coalesced 8"),
        ("--coalesce_topk concat --topk_coalesced", "--decoder target-tied --topk-coalesced 32"),
        ("--post_encoder_scale True --train_post_encoder True", "--pair-scale --pair-offset"),
        ("--train_post_encoder False", ""),
        ("--skip_connection True", "--skip pairs"),
        ("--skip_connection True --coalesce_topk concat", "--decoder target-tied --skip own"),
        ("--activation batchtopk", "--sparsity batch-topk"),
        ("--loss_fn kl-fvu --kl_coeff 0.5", "--loss-weight 0.5 --loss kl --fvu-weight 1"),
        ("--num_latents 64 --expansion_factor 4", "--expansion 4 --d-transcoder 64"),
        ("--init_seeds 0 1 2 --lr 1e-3", "--learning-rate 1e-3 --seed 0 1 2"),
        ("--grad_acc_steps 4 --dead_latent_penalty 1e-5", "--micro-batches 4 --dead-penalty 1e-5"),
        ("--transcode True --normalize_io True", ""),
        ("--divide_cross_layer False", ""),
    ],
)
def test_their_options_become_ours(theirs, ours):
    assert translate([*OURS, *theirs.split()]) == [*OURS, *ours.split()]


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        ("--coalesce_topk group", "--coalesce_topk is 'group'; choose none"),
        ("--activation relu", "--activation is 'relu'"),
        ("--loss_fn mse", "--loss_fn is 'mse'"),
        ("--transcode False", "--transcode is False"),
        ("--divide_cross_layer True", "--divide_cross_layer is EleutherAI's"),
        ("--batch_size 8", "--batch_size is EleutherAI's; it counts sequences; give --batch-tokens"),
        ("--secondary_target_tied True", "needs --per_source_tied"),
        ("--cross_layer", "--cross_layer needs a value"),
        ("--cross_layer --k 3", "--cross_layer needs a value"),
    ],
)
def test_what_has_no_equivalent_is_refused_by_name(theirs, named):
    with pytest.raises(UserError, match=named):
        translate([*OURS, *theirs.split()])
