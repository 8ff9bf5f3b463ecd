"""The weights of circuit-tracer: a folder for a cross-layer transcoder, another kind for a set of per-layer ones.

* `cross_layer_transcoder`: `W_enc_{i}.safetensors` with `W_enc_{i}` [F, D], `b_enc_{i}`, `b_dec_{i}` and, for JumpReLU,
  `threshold_{i}`; `W_dec_{i}.safetensors` with `W_dec_{i}` [F, L - i, D], the own layer first.
* `transcoder_set`: `layer_{i}.safetensors` with `W_enc`, `W_dec` [F, D], `b_enc`, `b_dec`, for JumpReLU
  `activation_function.threshold`, and `W_skip` [out, in] where there is a skip connection.

`config.yaml` says which, and what is read. Features are active strictly above their threshold and are not rescaled.

Source: github.com/decoderesearch/circuit-tracer at 4bb8c0e: transcoder/{cross_layer,single_layer}_transcoder.py,
utils/{hf_utils,caching}.py.

Axes: F features a layer, L layers, D d_model.
"""

from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Float
from torch import Tensor

from crosslayer.coders.sparsity import JumpReLU, ReLU
from crosslayer.coders.transcoder import CrossLayerTranscoder, Provenance
from crosslayer.errors import UserError
from crosslayer.files import claim_folder, read_tensors, write_tensors, write_text
from crosslayer.formats.checks import check_export, check_read, count_layers, matrix_shape, read_checked
from crosslayer.wiring import Wiring

CONFIG, W_ENC, W_DEC, LAYER = "config.yaml", "W_enc_{}.safetensors", "W_dec_{}.safetensors", "layer_{}.safetensors"
THRESHOLD = "activation_function.threshold"
HOOKS = {"resid": ("hook_resid_mid", "hook_mlp_out"), "mlp_in": ("mlp.hook_in", "mlp.hook_out")}
"""What a transcoder of each site of ours is said to read and to write."""


@torch.no_grad()
def read_circuit_tracer(path: Path, read: str | None = None) -> CrossLayerTranscoder:
    """A folder of circuit-tracer's as a transcoder of the same function, in float32.

    Decoders that are exactly zero for all layers' targets beyond some distance were out of a window, so the wiring
    becomes that window; where all sources' own layers are zero, sources start at the next layer.

    circuit-tracer switches the features of a prompt's first position off, as we do, and keeps what the model itself
    writes there. A replacement model of ours has `CrossLayerTranscoder.first_write` for that, which no file tells: it
    stays 0, and 0 is written at the first position, until it is filled in.

    Args:
        path: the folder with `config.yaml`.
        read: the site that the encoders read; by default what `feature_input_hook` says.

    Raises:
        UserError: naming the file, tensor or setting that is missing or wrong, or has no equal here: TopK, whose
            features may be negative there, thresholds below 0, files named in `transcoders`.
    """
    path = Path(path)
    config = _read_config(path / CONFIG)
    site = check_read(_site(path / CONFIG, config) if read is None else read)
    coder = _read_clt(path) if config["model_kind"] == "cross_layer_transcoder" else _read_plt(path)
    coder.provenance = Provenance(model_id=config.get("model_name") or "", read=site)
    return coder


@torch.no_grad()
def write_circuit_tracer(
    coder: CrossLayerTranscoder, path: Path, scan: str | None = None, overwrite: bool = False
) -> None:
    """Write a folder that circuit-tracer loads: a transcoder set for a PLT, else a cross-layer transcoder.

    Any bank is written, as the write vectors that it amounts to. What a wiring leaves out (targets beyond its span,
    the own layer under first_target 1, and then the last layer's features) is written as zeros. circuit-tracer has no
    place for what a coder writes at the first position (`first_write`); it keeps the model's own write there.

    Args:
        coder: a finished JumpReLU or ReLU transcoder.
        path: the folder.
        scan: name under which circuit-tracer's users find the features' pages.
        overwrite: whether the folder may hold such files, which are then replaced.

    Raises:
        UserError: for a transcoder that this format cannot hold, naming why, and a folder that cannot be used.
    """
    path = Path(path)
    thresholds, per_layer = _thresholds(coder), coder.wiring == Wiring.per_layer(coder.wiring.n_layers)
    _check_writable(coder, per_layer)
    claim_folder(path, overwrite, (CONFIG, *(name.format("*") for name in (W_ENC, W_DEC, LAYER))))
    for layer in range(coder.wiring.n_layers):
        if per_layer:
            _write_layer(coder, path, layer, thresholds)
        else:
            _write_source(coder, path, layer, thresholds)
    kind = "transcoder_set" if per_layer else "cross_layer_transcoder"
    read, write = HOOKS[coder.provenance.read]
    config = {"model_name": coder.provenance.model_id, "model_kind": kind}
    config |= {"feature_input_hook": read, "feature_output_hook": write} | ({"scan": scan} if scan else {})
    write_text(path / CONFIG, yaml.safe_dump(config, sort_keys=False))


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give a folder that circuit-tracer loads") from None
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"{file}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    kind = config.get("model_kind") if isinstance(config, dict) else None
    if kind not in ("cross_layer_transcoder", "transcoder_set"):
        raise UserError(f"{file}: model_kind is {kind!r}; choose cross_layer_transcoder or transcoder_set")
    if "transcoders" in config:
        raise UserError(f"{file}: transcoders names files elsewhere; let circuit-tracer save them to one folder first")
    if (hook := config.get("feature_output_hook")) not in {write for _, write in HOOKS.values()}:
        raise UserError(f"{file}: feature_output_hook is {hook!r}; only hook_mlp_out and mlp.hook_out are an MLP's")
    if config.get("activation") not in (None, "relu", "jump_relu"):
        raise UserError(
            f"{file}: activation is {config['activation']!r}, which there keeps negative features too and has no equal "
            "here; only relu and jump_relu have"
        )
    return config


def _site(file: Path, config: dict[str, Any]) -> str:
    """What the encoders read, by the names of hooks."""
    hook = config.get("feature_input_hook")
    for site, (read, _) in HOOKS.items():
        if hook == read:
            return site
    why = ", the normalised stream before the norm's gain" if hook == "ln2.hook_normalized" else ""
    raise UserError(
        f"{file}: feature_input_hook is {hook!r}{why}; hook_resid_mid and mlp.hook_in are known, for another say with "
        "read which of resid and mlp_in it equals"
    )


def _read_clt(path: Path) -> CrossLayerTranscoder:
    L = count_layers(path, W_ENC, W_DEC)
    first = read_tensors(path / W_ENC.format(0))[0]
    F, D = matrix_shape(path / W_ENC.format(0), first, "W_enc_0")
    jump = "threshold_0" in first
    coder = CrossLayerTranscoder(_window(path, L, F, D), D, F, JumpReLU() if jump else ReLU())
    thresholds = torch.zeros(len(coder.sources), F)
    for layer in range(L):
        file = path / W_ENC.format(layer)
        shapes = {f"W_enc_{layer}": (F, D), f"b_enc_{layer}": (F,), f"b_dec_{layer}": (D,)}
        tensors = read_checked(file, shapes | ({f"threshold_{layer}": (F,)} if jump else {}))
        coder.b_dec[layer] = tensors[f"b_dec_{layer}"]
        if layer in coder.sources:
            i, targets = coder.sources.index(layer), coder.wiring.targets(layer)
            coder.W_enc[i].copy_(tensors[f"W_enc_{layer}"])
            coder.b_enc[i].copy_(tensors[f"b_enc_{layer}"])
            thresholds[i] = _threshold(file, f"threshold_{layer}", tensors) if jump else 0
            coder.W_dec[i].copy_(_read_decoder(path, layer, L, F, D)[:, targets.start - layer : targets.stop - layer])
    return coder.with_thresholds(thresholds) if jump else coder


def _read_decoder(path: Path, layer: int, L: int, F: int, D: int) -> Float[Tensor, "F offsets D"]:
    name = f"W_dec_{layer}"
    return read_checked(path / W_DEC.format(layer), {name: (F, L - layer, D)})[name]


def _window(path: Path, L: int, F: int, D: int) -> Wiring:
    """The smallest wiring outside which all decoders are exactly zero; read layer by layer, to hold one at a time."""
    written = torch.zeros(L, dtype=torch.bool)
    for layer in range(L):
        written[: L - layer] |= (_read_decoder(path, layer, L, F, D) != 0).any(2).any(0)
    if not written.any():
        return Wiring.full(L)
    first_target = 0 if written[0] else 1
    return Wiring(L, int(written.nonzero().max()) + 1 - first_target, first_target)


def _threshold(file: Path, name: str, tensors: dict[str, Tensor]) -> Float[Tensor, " F"]:
    if (tensors[name] < 0).any():
        raise UserError(
            f"{file}: tensor {name} goes down to {float(tensors[name].min()):.3g}, so features may be negative, which "
            "has no equal here; thresholds of 0 or more are wanted"
        )
    return tensors[name]


def _read_plt(path: Path) -> CrossLayerTranscoder:
    L = count_layers(path, LAYER)
    first = read_tensors(path / LAYER.format(0))[0]
    F, D = matrix_shape(path / LAYER.format(0), first, "W_enc")
    shapes = {"W_enc": (F, D), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
    shapes |= {name: shape for name, shape in ((THRESHOLD, (F,)), ("W_skip", (D, D))) if name in first}
    wiring, jump = Wiring.per_layer(L), THRESHOLD in first
    coder = CrossLayerTranscoder(
        wiring, D, F, JumpReLU() if jump else ReLU(), skip=wiring if "W_skip" in first else None
    )
    thresholds = torch.zeros(L, F)
    for layer in range(L):
        file = path / LAYER.format(layer)
        tensors = read_checked(file, shapes)
        coder.W_enc[layer].copy_(tensors["W_enc"])
        coder.b_enc[layer].copy_(tensors["b_enc"])
        coder.W_dec[layer].copy_(tensors["W_dec"][:, None])
        coder.b_dec[layer] = tensors["b_dec"]
        thresholds[layer] = _threshold(file, THRESHOLD, tensors) if jump else 0
        if coder.skip is not None:
            coder.W_skip[layer].copy_(tensors["W_skip"][None])
    return coder.with_thresholds(thresholds) if jump else coder


def _thresholds(coder: CrossLayerTranscoder) -> Float[Tensor, "S F"] | None:
    """What decides which features are active; None for every positive one."""
    if coder.thresholds is not None:
        return coder.thresholds.clamp(min=0)
    if isinstance(coder.sparsity, ReLU):
        return None
    raise UserError(
        f"this transcoder's sparsity is {type(coder.sparsity).__name__} without fixed thresholds, which this format "
        "wants; finish its training or calibrate it first"
    )


def _check_writable(coder: CrossLayerTranscoder, per_layer: bool) -> None:
    check_export(coder)
    if any(offset.any() for offset in coder.decoder.offset):
        raise UserError("this transcoder's decoder has offsets, and this format has no place for them; train without")
    if coder.skip is not None and not (per_layer and coder.skip == coder.wiring):
        raise UserError(
            "this transcoder has a skip connection, and this format has a place for one from each layer to itself in a "
            "per-layer transcoder alone; train without"
        )


def _write_source(coder: CrossLayerTranscoder, path: Path, layer: int, thresholds: Tensor | None) -> None:
    """Write both files of a cross-layer transcoder's layer; a layer without features has all-zero ones."""
    L, F, D = coder.wiring.n_layers, coder.d_transcoder, coder.d_model
    tensors = {"W_enc": torch.zeros(F, D), "b_enc": torch.zeros(F), "b_dec": coder.b_dec[layer]}
    if thresholds is not None:
        tensors["threshold"] = torch.zeros(F)
    W_dec = torch.zeros(F, L - layer, D).to(coder.b_dec)
    if layer in coder.sources:
        i, targets = coder.sources.index(layer), coder.wiring.targets(layer)
        tensors |= {"W_enc": coder.W_enc[i], "b_enc": coder.b_enc[i]}
        tensors |= {} if thresholds is None else {"threshold": thresholds[i]}
        W_dec[:, targets.start - layer : targets.stop - layer] = coder.decoder.vectors(i)
    write_tensors(path / W_ENC.format(layer), {f"{name}_{layer}": tensor for name, tensor in tensors.items()})
    write_tensors(path / W_DEC.format(layer), {f"W_dec_{layer}": W_dec})


def _write_layer(coder: CrossLayerTranscoder, path: Path, layer: int, thresholds: Tensor | None) -> None:
    """Write the file of a per-layer transcoder's layer."""
    tensors = {
        "W_enc": coder.W_enc[layer],
        "W_dec": coder.decoder.vectors(layer)[:, 0],
        "b_enc": coder.b_enc[layer],
        "b_dec": coder.b_dec[layer],
    }
    if thresholds is not None:
        tensors[THRESHOLD] = thresholds[layer]
    if coder.skip is not None:
        tensors["W_skip"] = coder.W_skip[layer][0]
    write_tensors(path / LAYER.format(layer), tensors)
