"""The cross-layer transcoders of Gemma Scope 2: `params_layer_{i}.safetensors`, `x @ w_enc`, all layers to all layers.

Source: huggingface.co/google/gemma-scope-2-1b-pt, folders `clt/width_..._l0_...`; as circuit-tracer at 4bb8c0e loads
them (transcoder/cross_layer_transcoder.py, whose range leaves the last layer out).
"""

from pathlib import Path

import torch

from crosslayer.coders.sparsity import JumpReLU
from crosslayer.coders.transcoder import CrossLayerTranscoder, Provenance
from crosslayer.errors import UserError
from crosslayer.files import read_tensors
from crosslayer.formats.checks import check_read, count_layers, matrix_shape, read_checked
from crosslayer.wiring import Wiring

FILE = "params_layer_{}.safetensors"


@torch.no_grad()
def read_gemma_scope(path: Path, model_id: str = "", read: str = "mlp_in") -> CrossLayerTranscoder:
    """A Gemma Scope 2 cross-layer transcoder, in float32.

    Each layer's file holds `w_enc` [D, F], `w_dec` [F, L, D], `b_enc`, `threshold` [F], `b_dec` [D] and, with a skip
    connection from each layer to itself, `affine_skip_connection` [in, out]. What is written is the output of Gemma 3's
    `post_feedforward_layernorm`, and the first position has no value (see `read_circuit_tracer`).

    Raises:
        UserError: naming the file and tensor that is missing or wrong, or writes to an earlier layer.
    """
    path = Path(path)
    L, first = count_layers(path, FILE), read_tensors(path / FILE.format(0))[0]
    D, F = matrix_shape(path / FILE.format(0), first, "w_enc")
    shapes = {"w_enc": (D, F), "w_dec": (F, L, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
    affine = "affine_skip_connection" in first
    shapes |= {"affine_skip_connection": (D, D)} if affine else {}
    coder = CrossLayerTranscoder(Wiring.full(L), D, F, JumpReLU(), skip=Wiring.per_layer(L) if affine else None)
    thresholds = torch.zeros(L, F)
    for layer in range(L):
        tensors = read_checked(path / FILE.format(layer), shapes)
        if tensors["w_dec"][:, :layer].any():
            raise UserError(
                f"{path / FILE.format(layer)}: tensor w_dec writes to earlier layers; zeros are wanted there"
            )
        coder.W_enc[layer].copy_(tensors["w_enc"].T)
        coder.b_enc[layer].copy_(tensors["b_enc"])
        coder.W_dec[layer].copy_(tensors["w_dec"][:, layer:])
        coder.b_dec[layer] = tensors["b_dec"]
        thresholds[layer] = tensors["threshold"]  # below 0 they are as 0, there as here
        if affine:
            coder.W_skip[layer].copy_(tensors["affine_skip_connection"].T[None])
    coder.provenance = Provenance(model_id=model_id, read=check_read(read))
    return coder.with_thresholds(thresholds)
