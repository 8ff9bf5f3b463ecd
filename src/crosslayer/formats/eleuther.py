"""EleutherAI's `sparsify`: runs of clt-training (per-layer and cross-layer) and transcoders of its parent project.

A run has one folder for each hookpoint (`h.3.mlp`, `layers.3.mlp`), which holds `cfg.json` and `sae.safetensors`, and a
`config.json` of the training. Target offset o of layer l is layer l + o. Weights are latents-first: `a @ W_dec + b_dec`
and `x @ W_skip.T`, as ours.

Source: github.com/EleutherAI/clt-training at cf9821f (2025-08-11): sparsify/sparse_coder.py, runner.py, trainer.py.

Axes: F features a layer, T targets of a source, D d_model.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.coders.decoders import Decoder, Full, SourceAndTargetTied, SourceTied, TargetTied
from crosslayer.coders.sparsity import GroupMax, Sparsity, TopK
from crosslayer.coders.transcoder import CrossLayerTranscoder, Provenance
from crosslayer.errors import UserError
from crosslayer.files import claim_folder, read_json, read_tensors, write_json, write_tensors
from crosslayer.formats.checks import check_export, check_read, checked
from crosslayer.wiring import Wiring

CFG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"
FORMER = ("multi_topk",)
"""Settings of earlier versions that concern the training alone."""
ALIASES = {"W_dec": "W_decs.0", "b_dec": "b_decs.0", "W_skip": "W_skips.0"}
"""Second names, under which a cross-layer file repeats what a source has for its own layer."""
PER_TARGET = ("untied", "source", "source-and-target")
"""Ways of tying with a bias and a skip for each target of a source; the others have those of the layer alone."""


@dataclass(frozen=True, kw_only=True)
class _Config:
    """`cfg.json`: every field of their SparseCoderConfig, with their defaults, and d_in."""

    dtype: str = "none"
    activation: str = "topk"
    expansion_factor: int = 32
    normalize_decoder: bool = True
    num_latents: int = 0
    k: int = 32
    skip_connection: bool = False
    transcode: bool = False
    tp_output: bool = True
    n_targets: int = 0
    n_sources: int = 0
    normalize_io: bool = False
    divide_cross_layer: bool = False
    train_post_encoder: bool | None = None
    """None where the file does not name it: the parent project, which has no post-encoder."""
    post_encoder_scale: bool = False
    per_source_tied: bool = False
    secondary_target_tied: bool = False
    coalesce_topk: str = "none"
    topk_coalesced: bool = False
    use_fp8: bool = False
    d_in: int = 0

    @property
    def d_transcoder(self) -> int:
        return self.num_latents or self.d_in * self.expansion_factor

    @property
    def tying(self) -> str:
        """How decoders are shared; a transcoder of one layer has nothing to share."""
        if not self.n_targets:
            return "untied"
        if self.coalesce_topk != "none":
            return self.coalesce_topk
        if not self.per_source_tied:
            return "untied"
        return "source-and-target" if self.secondary_target_tied else "source"


@dataclass(frozen=True)
class _Layer:
    """One hookpoint's folder."""

    folder: Path
    cfg: _Config
    tensors: dict[str, Tensor]

    def each(self, name: str) -> list[Tensor]:
        """The tensors of a name for every target offset, or the one that there is."""
        names = [*_each(name, self.cfg.n_targets), name]
        return [self.tensors[own] for own in dict.fromkeys(names) if own in self.tensors]


@torch.no_grad()
def read_eleuther(path: Path, read: str | None = None) -> CrossLayerTranscoder:
    """A run of EleutherAI's as a transcoder of the same function, in float32.

    * A plain transcoder and an untied run become `Full`, `coalesce_topk=per-layer` too (its target-major rows are
      regrouped by source), `per_source_tied` `SourceTied`, `secondary_target_tied` `SourceAndTargetTied`, and
      `coalesce_topk=concat` `TargetTied`.
    * `post_encs` and `post_enc_scales` become offsets and scales; where all are exactly 0 (or 1) the bank has none.
      Before 8 July 2025 theirs added an offset to selected latents of activation 0 too, which no file tells.
    * The biases that several sources add to one target are summed.
    * `normalize_io` and `divide_cross_layer` are folded into the weights.
    * Their first position is like any other and ours is not (`CrossLayerTranscoder.first_write`); a run says nothing
      about it, so it stays 0: a replacement model then writes 0 at the first position until it is filled in.

    Args:
        path: the run's folder, with a folder for each hookpoint, all layers of the model from 0 on.
        read: the site that the encoders read; by default what `hookpoints_in` in `config.json` says: `resid` for the
            input of a norm, else `mlp_in`.

    Raises:
        UserError: naming the file, tensor or setting that is missing or wrong, or has no equal here: batch TopK, sparse
            autoencoders, hookpoints that are whole layers, k that differs between layers.
    """
    path = Path(path)
    run = _read_run(path)
    site = check_read(_site(path, run) if read is None else read)
    layers = [_read_layer(folder) for folder in _folders(path, run)]
    _check_alike(layers)
    coder = _fill(_build(layers), layers)
    coder.provenance = Provenance(run.get("model") or "", run.get("revision") or "", site)
    return coder


@torch.no_grad()
def write_eleuther(
    coder: CrossLayerTranscoder,
    path: Path,
    hookpoint: str = "layers.{}.mlp",
    norm: str = "layers.{}.post_attention_layernorm",
    overwrite: bool = False,
) -> None:
    """Write a run that EleutherAI's `sparsify` loads: plain transcoders for a PLT, else an untied cross-layer run.

    Any bank is written, as the full decoder that it amounts to. A target's bias goes to its own layer. What a coder
    writes at the first position (`first_write`) has no place in this format.

    Args:
        coder: a finished TopK or GroupMax transcoder.
        path: the run's folder.
        hookpoint: names of the modules that are stood in for, `{}` for the layer's number.
        norm: names of the norms before them, whose input is read where the transcoder's site is `resid`.
        overwrite: whether the folder may hold a run, which is then replaced.

    Raises:
        UserError: for a transcoder that this format cannot hold, naming why, and a folder that cannot be used.
    """
    path = Path(path)
    _check_writable(coder)
    if "{}" not in hookpoint or "{}" not in norm:
        raise UserError(f"hookpoint is {hookpoint!r} and norm {norm!r}; both need a {{}} for the layer's number")
    claim_folder(path, overwrite, (f"*/{CFG}", f"*/{WEIGHTS}", RUN))
    names = [hookpoint.format(layer) for layer in range(coder.wiring.n_layers)]
    for layer, name in enumerate(names):
        write_tensors(path / name / WEIGHTS, _tensors(coder, layer))
        write_json(path / name / CFG, asdict(_config(coder, layer)))
    norms = [norm.format(layer) for layer in range(len(names))] if coder.provenance.read == "resid" else []
    write_json(path / RUN, _run_config(coder, names, norms))


def _read_run(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the run that holds a folder for every hookpoint")
    run = read_json(path / RUN) if (path / RUN).is_file() else {}
    if not isinstance(run, dict):
        raise UserError(f"{path / RUN}: holds a {type(run).__name__}; the run's configuration is wanted")
    return run


def _folders(path: Path, run: dict[str, Any]) -> list[Path]:
    """The layers' folders, in order."""
    found = {folder.name for folder in path.iterdir() if (folder / CFG).is_file() or (folder / WEIGHTS).is_file()}
    named = [name for name in run.get("hookpoints") or [] if not re.search(r"[*?[]", name)]
    if lost := [name for name in named if name not in found]:
        raise UserError(f"{path}: holds no {lost[0]}, which its {RUN} names; copy the run again")
    if not found:
        raise UserError(f"{path}: no folder in it holds {CFG} and {WEIGHTS}; give the run's folder")
    numbers = {_layer_number(path / name): name for name in sorted(found)}
    if len(numbers) < len(found) or len({re.sub(r"\d+", "#", name) for name in found}) > 1:
        raise UserError(f"{path}: holds several hookpoints of a layer, {', '.join(sorted(found)[:2])}; keep the MLPs'")
    if wrong := set(range(len(numbers))) - set(numbers):
        raise UserError(f"{path}: has no folder for layer {min(wrong)}; a run of all layers from 0 on is wanted")
    return [path / numbers[layer] for layer in range(len(numbers))]


def _layer_number(folder: Path) -> int:
    parts = folder.name.split(".")
    numbers = [part for part in parts if part.isdecimal()]
    if len(numbers) != 1:
        raise UserError(f"{folder}: its name should hold the number of one layer, as layers.3.mlp does")
    if parts[-1] == numbers[0]:
        raise UserError(f"{folder}: stands in for a whole layer; train it on the layers' MLPs (--hookpoints '*.mlp')")
    return int(numbers[0])


def _site(path: Path, run: dict[str, Any]) -> str:
    """What the encoders read: the module's own input, unless `hookpoints_in` names a norm, whose input it then is."""
    inputs, modules = run.get("hookpoints_in") or [], run.get("hookpoints") or []
    if not inputs or inputs == modules:
        return "mlp_in"
    if len(inputs) == len(modules) and all(re.search(r"(norm|ln_?\d*)$", name) for name in inputs):
        return "resid"
    raise UserError(
        f"{path / RUN}: hookpoints_in is {inputs[0]}, ...; say what that is with read: resid (the stream before the "
        "MLP's norm) or mlp_in"
    )


def _read_layer(folder: Path) -> _Layer:
    cfg = _read_cfg(folder / CFG)
    _check_cfg(folder / CFG, cfg)
    shapes, file = _shapes(cfg), folder / WEIGHTS
    return _Layer(folder, cfg, checked(file, _without_aliases(file, read_tensors(file)[0], shapes), shapes))


def _read_cfg(file: Path) -> _Config:
    found = read_json(file)
    known = {field.name: bool if field.default is None else type(field.default) for field in fields(_Config)}
    if not isinstance(found, dict) or "d_in" not in found:
        raise UserError(f"{file}: names no d_in; the {CFG} of a sparse coder is wanted")
    for name, value in found.items():
        if name not in known and name not in FORMER:
            raise UserError(f"{file}: {name} is {value!r}, a setting that this version does not know")
        if name in known and not isinstance(value, known[name]):
            raise UserError(f"{file}: {name} is {value!r}; its type should be {known[name].__name__}")
    return _Config(**{name: value for name, value in found.items() if name in known})


def _check_cfg(file: Path, cfg: _Config) -> None:
    """Refuse settings without an equal here."""
    if not cfg.transcode:
        raise UserError(f"{file}: transcode is false, a sparse autoencoder; only transcoders can be read")
    if cfg.activation == "batchtopk":
        raise UserError(
            f"{file}: activation is batchtopk, which depends on the batch and stores no threshold; finetune the run "
            "with --activation topk and read that"
        )
    if cfg.activation not in ("topk", "groupmax"):
        raise UserError(f"{file}: activation is {cfg.activation!r}; choose topk or groupmax")
    if cfg.coalesce_topk not in ("none", "concat", "per-layer"):
        raise UserError(f"{file}: coalesce_topk is {cfg.coalesce_topk!r}; choose none, concat or per-layer")
    if cfg.topk_coalesced and cfg.tying == "per-layer":
        raise UserError(f"{file}: topk_coalesced with coalesce_topk per-layer has no equal here; only concat has")
    if cfg.secondary_target_tied and (cfg.tying != "source-and-target" or cfg.divide_cross_layer):
        raise UserError(
            f"{file}: secondary_target_tied can only be read with per_source_tied, coalesce_topk none, cross-layer "
            "targets and no divide_cross_layer"
        )


def _shapes(cfg: _Config) -> dict[str, tuple[int, ...]]:
    """Every tensor that a layer's file must hold."""
    F, D, targets = cfg.d_transcoder, cfg.d_in, cfg.n_targets
    own = targets if cfg.tying in PER_TARGET else 0
    rows = F * max(1, cfg.n_sources) if cfg.tying == "per-layer" else F
    shapes: dict[str, tuple[int, ...]] = {"encoder.weight": (F, D), "encoder.bias": (F,)}
    shapes |= dict.fromkeys(_each("W_dec", targets if cfg.tying == "untied" else 0), (rows, D))
    shapes |= dict.fromkeys(_each("b_dec", own), (D,))
    if cfg.skip_connection:
        shapes |= dict.fromkeys(_each("W_skip", own), (D, D))
    if cfg.train_post_encoder is not None:
        shapes |= dict.fromkeys(_each("post_enc", targets), (F,))
    if cfg.post_encoder_scale:
        shapes |= dict.fromkeys(_each("post_enc_scale", targets), (F,))
    return shapes | (dict.fromkeys(("in_norm", "out_norm"), (1,)) if cfg.normalize_io else {})


def _each(name: str, n_targets: int) -> list[str]:
    """Names of a list of tensors, one for each target, or of the one there is without cross-layer targets."""
    return [f"{name}s.{o}" for o in range(n_targets)] or [name]


def _without_aliases(file: Path, tensors: dict[str, Tensor], shapes: dict[str, Any]) -> dict[str, Tensor]:
    found = [a for a, own in ALIASES.items() if a in tensors and a not in shapes and own in shapes and own in tensors]
    for alias in found:
        if not torch.equal(tensors[alias], tensors[ALIASES[alias]]):
            raise UserError(f"{file}: tensor {alias} differs from {ALIASES[alias]}, of which it should be a copy")
    return {name: tensor for name, tensor in tensors.items() if name not in found}


def _check_alike(layers: Sequence[_Layer]) -> None:
    """Refuse a run whose layers differ in more than their number of targets, or in that as no span explains."""
    first, L = layers[0], len(layers)
    for number, layer in enumerate(layers):
        ours, others = asdict(layer.cfg), asdict(first.cfg)
        for name in ours.keys() - {"n_targets", "n_sources"}:
            if ours[name] != others[name]:
                raise UserError(
                    f"{layer.folder / CFG}: {name} is {ours[name]}, in {first.folder.name} {others[name]}; a "
                    "transcoder has the same in all layers"
                )
        if layer.cfg.n_targets != (wanted := min(first.cfg.n_targets, L - number)):
            raise UserError(
                f"{layer.folder / CFG}: n_targets is {layer.cfg.n_targets}; layer {number} of {L}, in a run whose "
                f"first has {first.cfg.n_targets}, should have {wanted}"
            )
        live = min(number + 1, first.cfg.n_targets)
        if layer.cfg.tying == "per-layer" and layer.cfg.n_sources < live:
            raise UserError(f"{layer.folder / CFG}: n_sources is {layer.cfg.n_sources}, but {live} layers write to it")


def _build(layers: Sequence[_Layer]) -> CrossLayerTranscoder:
    """The transcoder that a run describes, still without weights."""
    cfg, L = layers[0].cfg, len(layers)
    wiring = Wiring(L, cfg.n_targets) if cfg.n_targets else Wiring.per_layer(L)
    skip = (wiring if cfg.tying in PER_TARGET else Wiring.per_layer(L)) if cfg.skip_connection else None
    try:
        return CrossLayerTranscoder(wiring, cfg.d_in, cfg.d_transcoder, _sparsity(cfg), _bank(layers, wiring), skip)
    except UserError as error:
        raise UserError(f"{layers[0].folder / CFG}: {error}") from None


def _sparsity(cfg: _Config) -> Sparsity:
    """Their k is not annealed any more."""
    kind = TopK if cfg.activation == "topk" else GroupMax
    return kind(cfg.k, anneal_from=1.0, anneal_share=0.0)


def _bank(layers: Sequence[_Layer], wiring: Wiring) -> Decoder:
    cfg = layers[0].cfg
    scale = any((_scale(layer, s, wiring) != 1).any() for s, layer in enumerate(layers))
    offset = any(tensor.any() for layer in layers for tensor in layer.each("post_enc"))
    if cfg.tying == "concat":
        return TargetTied(cfg.k if cfg.topk_coalesced else None, scale=scale, offset=offset)
    kinds = {"source": SourceTied, "source-and-target": SourceAndTargetTied}
    return kinds.get(cfg.tying, Full)(scale=scale, offset=offset)


def _scale(layer: _Layer, s: int, wiring: Wiring) -> Float[Tensor, "F T"]:
    """Factors of a source's features for each target; one vector for all targets can be divided here alone."""
    F, T = layer.cfg.d_transcoder, wiring.n_targets(s)
    scales = layer.each("post_enc_scale")
    scale = torch.stack(scales, 1).float() if scales else torch.ones(F, T)
    return scale * _share(layer, s, wiring) if layer.cfg.tying == "source" else scale


def _share(layer: _Layer, s: int, wiring: Wiring) -> Float[Tensor, " T"]:
    """The share of a source's write that reaches each target: a mean over the others under `divide_cross_layer`."""
    if not layer.cfg.divide_cross_layer:
        return torch.ones(wiring.n_targets(s))
    return torch.tensor([1.0 if t == s else 1 / max(1, wiring.n_sources(t) - 1) for t in wiring.targets(s)])


def _fill(coder: CrossLayerTranscoder, layers: Sequence[_Layer]) -> CrossLayerTranscoder:
    """Copy a run's tensors, in place, and fold what normalises them."""
    for s, layer in enumerate(layers):
        coder.W_enc[s].copy_(layer.tensors["encoder.weight"])
        coder.b_enc[s].copy_(layer.tensors["encoder.bias"])
        _fill_decoder(coder, s, layer)
        _fill_pairs(coder, s, layer)
    if layers[0].cfg.normalize_io:
        coder.input_scale, coder.output_scale = (_norms(layers, name) for name in ("in_norm", "out_norm"))
    return coder.fold()


def _fill_decoder(coder: CrossLayerTranscoder, s: int, layer: _Layer) -> None:
    """Copy the write vectors that layer s stores."""
    bank, W, tying = coder.decoder.tensors(), layer.each("W_dec"), layer.cfg.tying
    if tying == "untied":
        bank[f"W_dec.{s}"].copy_(torch.stack(W, 1) * _share(layer, s, coder.wiring)[:, None])
    if tying in ("source", "source-and-target"):
        bank[f"W_dec.{s}"].copy_(W[0])
    if tying in ("concat", "source-and-target"):  # the second decode of the latter is by the very same matrix
        bank[f"W_target.{s}"].copy_(W[0])
    if tying == "per-layer":  # the oldest source first; with a span below L theirs leave room for one source too many
        for source, rows in zip(coder.wiring.sources(s), W[0].split(coder.d_transcoder), strict=False):
            bank[f"W_dec.{source}"][:, s - source] = rows


def _fill_pairs(coder: CrossLayerTranscoder, s: int, layer: _Layer) -> None:
    """Copy what layer s has for each of its targets beside write vectors."""
    bank, share = coder.decoder.tensors(), _share(layer, s, coder.wiring)
    if f"scale.{s}" in bank:
        bank[f"scale.{s}"].copy_(_scale(layer, s, coder.wiring))
    if f"offset.{s}" in bank:
        bank[f"offset.{s}"].copy_(torch.stack(layer.each("post_enc"), 1))
    biases, skips = layer.each("b_dec"), layer.each("W_skip")
    for t, b_dec, part in zip(coder.wiring.targets(s), biases, share, strict=False):
        coder.b_dec[t] += b_dec * part
    if skips:
        coder.W_skip[s].copy_(torch.stack(skips) * share[: len(skips), None, None])
    if layer.cfg.tying == "source-and-target":  # its second decode adds the own layer's bias and skip again
        coder.b_dec[s] += biases[0]
        if skips:
            coder.W_skip[s][0] += skips[0]


def _norms(layers: Sequence[_Layer], name: str) -> Float[Tensor, " L"]:
    """Mean lengths that a run was normalised by, in units of sqrt(D)."""
    norms = torch.cat([layer.tensors[name].float() for layer in layers])
    for layer, norm in zip(layers, norms, strict=True):
        if not norm > 0:
            raise UserError(f"{layer.folder / WEIGHTS}: {name} is {float(norm)}; a length above 0 is wanted")
    return norms / layers[0].cfg.d_in ** 0.5


def _check_writable(coder: CrossLayerTranscoder) -> None:
    check_export(coder)
    if not isinstance(coder.sparsity, TopK | GroupMax):
        raise UserError(
            f"this transcoder's sparsity is {type(coder.sparsity).__name__}, and this format has no place for "
            "thresholds; export one trained with topk or groupmax, or write circuit-tracer's format"
        )
    if coder.wiring.first_target:
        raise UserError("first_target is 1, but in this format a source writes to its own layer first; train with 0")
    if coder.skip is None:
        return
    for s in coder.skip.source_layers:
        if lost := set(coder.skip.targets(s)) - set(coder.wiring.targets(s)):
            raise UserError(
                f"the skip connection from layer {s} to {min(lost)} has no place beside the features' targets"
            )


def _config(coder: CrossLayerTranscoder, layer: int) -> _Config:
    """A layer's `cfg.json`."""
    plain = coder.wiring.span == 1
    assert isinstance(coder.sparsity, TopK | GroupMax)
    return _Config(
        activation="topk" if isinstance(coder.sparsity, TopK) else "groupmax",
        num_latents=coder.d_transcoder,
        k=coder.sparsity.k,
        skip_connection=coder.skip is not None,
        transcode=True,
        n_targets=0 if plain else coder.wiring.n_targets(layer),
        n_sources=0 if plain else coder.wiring.n_sources(layer),
        train_post_encoder=coder.decoder.settings.offset,
        post_encoder_scale=coder.decoder.settings.scale,
        d_in=coder.d_model,
    )


def _tensors(coder: CrossLayerTranscoder, layer: int) -> dict[str, Tensor]:
    """A layer's `sae.safetensors`."""
    bank, T = coder.decoder, coder.wiring.n_targets(layer)
    biases = torch.zeros(T, coder.d_model).to(coder.b_dec)
    biases[0] = coder.b_dec[layer]
    parts = {
        "W_dec": bank.base(layer, None).unbind(1),
        "b_dec": biases,
        "post_enc": (bank.offset[layer] if len(bank.offset) else torch.zeros(coder.d_transcoder, T)).unbind(1),
    }
    if len(bank.scale):
        parts["post_enc_scale"] = bank.scale[layer].unbind(1)
    if coder.skip is not None:
        parts["W_skip"] = _skips(coder, coder.skip, layer)
    tensors = {"encoder.weight": coder.W_enc[layer], "encoder.bias": coder.b_enc[layer]}
    for name, values in parts.items():
        names = _each(name, 0 if coder.wiring.span == 1 else T)
        tensors |= {own: value.clone() for own, value in zip(names, values, strict=True)}
    return tensors | {alias: tensors[own].clone() for alias, own in ALIASES.items() if own in tensors}


def _skips(coder: CrossLayerTranscoder, skip: Wiring, layer: int) -> Float[Tensor, "T D D"]:
    """A layer's skip connections to all of its features' targets; zero where it has none."""
    skips = torch.zeros(coder.wiring.n_targets(layer), coder.d_model, coder.d_model).to(coder.b_dec)
    for t in skip.targets(layer):
        skips[t - layer] = coder.W_skip[skip.source_layers.index(layer)][t - skip.targets(layer).start]
    return skips


def _run_config(coder: CrossLayerTranscoder, names: list[str], norms: list[str]) -> dict[str, Any]:
    """The part of `config.json` that says what the run belongs to."""
    return {
        "sae": asdict(_config(coder, 0)),
        "hookpoints": names,
        "hookpoints_in": norms,
        "cross_layer": 0 if coder.wiring.span == 1 else coder.wiring.span,
        "model": coder.provenance.model_id,
        "revision": coder.provenance.revision or None,
    }
