"""EleutherAI's command line (clt-training / sparsify) in our words, so that a line brought from there works.

Theirs writes booleans as `--name True` and takes underscores; a flag alone means True. What we have no equivalent of
is refused by name, as is a value that would change the meaning.
"""

from collections.abc import Callable, Sequence

from crosslayer.errors import UserError

VALUES = {"cross_layer", "coalesce_topk", "activation", "loss_fn", "kl_coeff", "expansion_factor", "num_latents", "lr"}
VALUES |= {"grad_acc_steps", "dead_latent_penalty", "init_seeds", "batch_size", "k_decay_steps", "k_anneal_mul"}
VALUES |= {"lr_warmup_steps", "dataset", "ctx_len", "auxk_alpha"}
FLAGS = {"transcode", "topk_coalesced", "post_encoder_scale", "train_post_encoder", "skip_connection", "normalize_io"}
FLAGS |= {"per_source_tied", "secondary_target_tied", "divide_cross_layer", "use_fp8", "tp_output", "filter_bos"}
RENAMED = {
    "expansion_factor": "expansion",
    "num_latents": "d-transcoder",
    "lr": "learning-rate",
    "grad_acc_steps": "micro-batches",
    "dead_latent_penalty": "dead-penalty",
    "init_seeds": "seed",
    "kl_coeff": "loss-weight",
}
ACTIVATIONS = {"topk": "topk", "batchtopk": "batch-topk", "groupmax": "groupmax"}
LOSSES = {"fvu": ["fvu"], "ce": ["ce"], "kl": ["kl"], "kl-fvu": ["kl", "--fvu-weight", "1"]}
REFUSED = {
    "divide_cross_layer": "it has no equivalent here; leave it out",
    "use_fp8": "products in fp8 are not offered; use --precision bf16",
    "batch_size": "it counts sequences; give --batch-tokens",
    "k_decay_steps": "it counts steps; give --anneal-share, a share of the training",
    "k_anneal_mul": "give --anneal-from",
    "lr_warmup_steps": "it counts steps; give --warmup-share, a share of the training",
    "dataset": "give the data as the second argument",
    "ctx_len": "text is taken as it is in the file; cut it there",
    "auxk_alpha": "give --auxk",
}
"""Why an option of theirs is not taken, and what to give instead."""


def translate(args: Sequence[str]) -> list[str]:
    """Our arguments for a `train` command line that may hold some of theirs.

    Raises:
        UserError: naming an option of theirs that has no equivalent.
    """
    ours, theirs = _separate(list(args))
    for name, value in theirs.items():
        if name in REFUSED and value != "False":
            raise UserError(f"--{name} is EleutherAI's; {REFUSED[name]}")
    for name, translated in RENAMED.items():
        if name in theirs:
            ours += [f"--{translated}", *theirs[name].split()]
    for rule in RULES:
        ours += rule(theirs, ours)
    return ours


def _separate(args: list[str]) -> tuple[list[str], dict[str, str]]:
    """What is ours, in order, and the options of theirs with their values."""
    ours, theirs = list[str](), dict[str, str]()
    while args:
        name, _, value = args.pop(0).partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--") or key not in VALUES | FLAGS:
            ours.append(f"{name}={value}" if value else name)
        elif value:
            theirs[key] = value
        elif key in FLAGS:
            theirs[key] = args.pop(0) if args and args[0] in ("True", "False") else "True"
        else:
            theirs[key] = " ".join(_values(args, name))
    return ours, theirs


def _values(args: list[str], name: str) -> list[str]:
    values = []
    while args and not args[0].startswith("--") and (not values or name in ("--init_seeds", "--init-seeds")):
        values.append(args.pop(0))
    if not values:
        raise UserError(f"{name} needs a value")
    return values


def _wiring(theirs: dict[str, str], ours: list[str]) -> list[str]:
    """cross_layer 0 means transcoders of one layer each."""
    return ["--span", "1" if theirs["cross_layer"] == "0" else theirs["cross_layer"]] if "cross_layer" in theirs else []


def _decoder(theirs: dict[str, str], ours: list[str]) -> list[str]:
    """Which vectors are shared; per-layer is the untied CLT in another order."""
    coalesce = theirs.get("coalesce_topk", "none")
    if coalesce not in ("none", "concat", "per-layer"):
        raise UserError(f"--coalesce_topk is {coalesce!r}; choose none, concat or per-layer")
    if _on(theirs, "per_source_tied"):
        return ["--decoder", "source-and-target-tied" if _on(theirs, "secondary_target_tied") else "source-tied"]
    if _on(theirs, "secondary_target_tied"):
        raise UserError("--secondary_target_tied needs --per_source_tied True")
    return ["--decoder", "target-tied"] if coalesce == "concat" else []


def _coalesced(theirs: dict[str, str], ours: list[str]) -> list[str]:
    """A target keeps k of its sources' active features."""
    if not _on(theirs, "topk_coalesced"):
        return []
    k = ours[ours.index("--k") + 1] if "--k" in ours else "32"
    return ["--topk-coalesced", k]


def _pairs(theirs: dict[str, str], ours: list[str]) -> list[str]:
    """Per-pair scales and offsets; theirs trains offsets unless told otherwise, ours when asked to."""
    named = {"post_encoder_scale": "--pair-scale", "train_post_encoder": "--pair-offset"}
    return [flag for name, flag in named.items() if _on(theirs, name)]


def _skip(theirs: dict[str, str], ours: list[str]) -> list[str]:
    """Theirs goes to every target of an untied coder, and to its own layer in one that is shared by targets."""
    if not _on(theirs, "skip_connection"):
        return []
    return ["--skip", "own" if theirs.get("coalesce_topk", "none") != "none" else "pairs"]


def _activation(theirs: dict[str, str], ours: list[str]) -> list[str]:
    """Theirs, topk by default, counts k in each layer."""
    if "activation" not in theirs:
        return []
    if theirs["activation"] not in ACTIVATIONS:
        raise UserError(f"--activation is {theirs['activation']!r}; choose one of {', '.join(ACTIVATIONS)}")
    return ["--sparsity", ACTIVATIONS[theirs["activation"]]]


def _loss(theirs: dict[str, str], ours: list[str]) -> list[str]:
    if "loss_fn" not in theirs:
        return []
    if theirs["loss_fn"] not in LOSSES:
        raise UserError(f"--loss_fn is {theirs['loss_fn']!r}; choose one of {', '.join(LOSSES)}")
    return ["--loss", *LOSSES[theirs["loss_fn"]]]


def _always(theirs: dict[str, str], ours: list[str]) -> list[str]:
    """What is always so here can be said, not denied."""
    for name, what in (("transcode", "only transcoders are trained"), ("normalize_io", "scales are always estimated")):
        if theirs.get(name) == "False":
            raise UserError(f"--{name} is False, but here {what}; leave it out")
    return []


RULES: tuple[Callable[[dict[str, str], list[str]], list[str]], ...] = (
    _wiring,
    _decoder,
    _coalesced,
    _pairs,
    _skip,
    _activation,
    _loss,
    _always,
)


def _on(theirs: dict[str, str], name: str) -> bool:
    return theirs.get(name) == "True"
