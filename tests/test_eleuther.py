"""EleutherAI's runs: their modes, built here file by file, against their formulas in numpy, and the way back."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from crosslayer import CrossLayerTranscoder, GroupMax, JointTopK, TopK, UserError, Wiring
from crosslayer.coders.decoders import Full, LowRank, SourceAndTargetTied, SourceTied, TargetTied
from crosslayer.coders.transcoder import Provenance
from crosslayer.files import read_json, read_tensors
from crosslayer.formats import read_eleuther, write_eleuther
from making import array

L, D, F, K, N = 4, 4, 12, 3, 40
CFG = {"num_latents": F, "k": K, "transcode": True, "d_in": D, "train_post_encoder": True}
PLAIN, UNTIED = {}, {"span": 3}
SOURCE = {"span": 3, "per_source_tied": True}
BOTH = {**SOURCE, "secondary_target_tied": True}
CONCAT = {"span": 3, "coalesce_topk": "concat"}
COALESCED = {**CONCAT, "topk_coalesced": True}
PER_LAYER = {"span": 3, "coalesce_topk": "per-layer"}
MODES = {
    "plain": (PLAIN, Full),
    "untied": (UNTIED, Full),
    "untied-all": ({"span": L}, Full),
    "untied-alone": ({"span": 1}, Full),
    "untied-divided": ({**UNTIED, "divide_cross_layer": True}, Full),
    "source": (SOURCE, SourceTied),
    "source-divided": ({**SOURCE, "divide_cross_layer": True}, SourceTied),
    "both": (BOTH, SourceAndTargetTied),
    "concat": (CONCAT, TargetTied),
    "concat-divided": ({**CONCAT, "divide_cross_layer": True}, TargetTied),
    "coalesced": (COALESCED, TargetTied),
    "per-layer": (PER_LAYER, Full),
    "per-layer-all": ({**PER_LAYER, "span": L}, Full),
}
EXTRAS = {
    "bare": {},
    "skip": {"skip_connection": True},
    "scale": {"post_encoder_scale": True},
    "normalised": {"normalize_io": True},
    "everything": {"skip_connection": True, "post_encoder_scale": True, "normalize_io": True, "activation": "groupmax"},
}


def layer_cfg(layer: int, n_layers: int = L, span: int = 0, **settings) -> dict:
    """What their trainer writes to `cfg.json`; it counts one source too many where the span is below L."""
    n_sources = sum(layer <= s + min(span, n_layers - s) for s in range(layer + 1)) if span else 0
    return {**CFG, "n_targets": min(span, n_layers - layer), "n_sources": n_sources, **settings}


def layer_tensors(cfg: dict, seed: int) -> dict[str, torch.Tensor]:
    """One layer's file in their layout. Every number is a small multiple of 1/64, so that sums are exact in float32."""
    generator = torch.Generator().manual_seed(seed)

    def grid(*shape: int) -> torch.Tensor:
        return torch.randint(-48, 49, shape, generator=generator) / 64

    several, coalesced = cfg["n_targets"], cfg.get("coalesce_topk", "none") != "none"
    rows = F * max(1, cfg["n_sources"]) if several and cfg.get("coalesce_topk") == "per-layer" else F
    tensors = {"encoder.weight": grid(F, D), "encoder.bias": grid(F)}
    if several and not coalesced and not cfg.get("per_source_tied"):
        tensors |= {f"W_decs.{o}": grid(F, D) for o in range(several)}
        tensors["W_dec"] = tensors["W_decs.0"].clone()
    else:
        tensors["W_dec"] = grid(rows, D)
    if several and not coalesced:
        tensors |= {f"b_decs.{o}": grid(D) for o in range(several)}
        tensors["b_dec"] = tensors["b_decs.0"].clone()
    else:
        tensors["b_dec"] = grid(D)
    if cfg.get("skip_connection"):
        if several and not coalesced:
            tensors |= {f"W_skips.{o}": grid(D, D) for o in range(several)}
            tensors["W_skip"] = tensors["W_skips.0"].clone()
        else:
            tensors["W_skip"] = grid(D, D)
    names = [f"s.{o}" for o in range(several)] or [""]
    tensors |= {f"post_enc{name}": grid(F).abs() for name in names}
    if cfg.get("post_encoder_scale"):
        tensors |= {f"post_enc_scale{name}": grid(F).abs() + 0.25 for name in names}
    if cfg.get("normalize_io"):
        tensors |= {"in_norm": torch.tensor([2.0 ** (seed % 3)]), "out_norm": torch.tensor([2.0 ** (1 + seed % 2)])}
    return tensors


def build_run(path: Path, name: str = "h.{}.mlp", n_layers: int = L, **settings) -> Path:
    for layer in range(n_layers):
        folder, cfg = path / name.format(layer), layer_cfg(layer, n_layers, **settings)
        folder.mkdir(parents=True)
        save_file(layer_tensors(cfg, seed=layer + 7), folder / "sae.safetensors")
        (folder / "cfg.json").write_text(json.dumps(cfg))
    return path


def reference(run: Path, x: np.ndarray) -> np.ndarray:
    """What a run computes, from its files alone: sources oldest first, target by target, as their runner goes."""
    layers = [load_layer(run / f"h.{layer}.mlp") for layer in range(x.shape[1])]
    xs = [x[:, s] * (D**0.5 / w["in_norm"] if "in_norm" in w else 1) for s, (_, w) in enumerate(layers)]
    zs = [active(cfg, xs[s] @ w["encoder.weight"].T + w["encoder.bias"]) for s, (cfg, w) in enumerate(layers)]
    y = np.zeros_like(x)
    for t, (cfg, w) in enumerate(layers):
        live = [s for s in range(t + 1) if t - s < max(1, layers[s][0]["n_targets"])]
        acts = {s: post_encoded(layers[s], zs[s], t - s) for s in live}
        mode = cfg.get("coalesce_topk", "none") if cfg["n_targets"] else "none"
        if mode == "none":
            others = sum((pair_write(layers[s], acts[s], xs[s], t - s) for s in live[:-1]), np.zeros_like(y[:, t]))
            part = 1 / max(1, len(live) - 1) if cfg.get("divide_cross_layer") else 1
            total = others * part + pair_write(layers[t], acts[t], xs[t], 0)
            if cfg.get("secondary_target_tied"):
                total = total + pair_write(layers[t], sum(acts.values()), xs[t], 0)
        else:
            total = coalesced_write(cfg, w, [acts[s] for s in live]) + own(w, xs[t])
        y[:, t] = total * (w["out_norm"] / D**0.5 if "out_norm" in w else 1)
    return y


def load_layer(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    tensors = load_file(folder / "sae.safetensors")
    return read_json(folder / "cfg.json"), {name: tensor.astype(float) for name, tensor in tensors.items()}


def active(cfg: dict, pre: np.ndarray) -> np.ndarray:
    z = np.maximum(pre, 0)
    if cfg.get("activation") == "groupmax":
        groups = z.reshape(len(z), cfg["k"], -1)
        return np.where(groups == groups.max(2, keepdims=True), groups, 0).reshape(z.shape)
    return np.where(z >= np.sort(z, 1)[:, -cfg["k"], None], z, 0)


def post_encoded(layer: tuple[dict, dict], z: np.ndarray, o: int) -> np.ndarray:
    cfg, w = layer
    suffix = f"s.{o}" if cfg["n_targets"] else ""
    scale = w[f"post_enc_scale{suffix}"] if cfg.get("post_encoder_scale") else 1
    return (z + w[f"post_enc{suffix}"] * (z > 0)) * scale


def pair_write(layer: tuple[dict, dict], a: np.ndarray, x: np.ndarray, o: int) -> np.ndarray:
    w = layer[1]
    W_dec, b_dec = w.get(f"W_decs.{o}", w["W_dec"]), w.get(f"b_decs.{o}", w["b_dec"])
    W_skip = w.get(f"W_skips.{o}", w.get("W_skip", np.zeros((D, D))))
    return a @ W_dec + b_dec + x @ W_skip.T


def own(w: dict, x: np.ndarray) -> np.ndarray:
    return w["b_dec"] + x @ w.get("W_skip", np.zeros((D, D))).T


def coalesced_write(cfg: dict, w: dict, acts: list[np.ndarray]) -> np.ndarray:
    candidates = np.concatenate(acts, 1)
    if cfg.get("topk_coalesced"):
        candidates = np.where(candidates >= np.sort(candidates, 1)[:, -cfg["k"], None], candidates, 0)
    if cfg["coalesce_topk"] == "concat":
        return sum(np.split(candidates, len(acts), 1)) @ w["W_dec"]
    return candidates @ w["W_dec"][: candidates.shape[1]]


def inputs(n_layers: int = L) -> torch.Tensor:
    return torch.randn(N, n_layers, D, dtype=torch.double, generator=torch.Generator().manual_seed(3))


def layer_by_layer(coder: CrossLayerTranscoder, x: torch.Tensor) -> torch.Tensor:
    """As a replacement model does: each layer's write once the layers up to it were added."""
    writes, ys = coder.writes(len(x)), []
    for layer in range(x.shape[1]):
        coder.add_layer(writes, layer, coder.encode_layer(layer, x[:, layer]), x[:, layer])
        ys.append(coder.write(writes, layer))
    return torch.stack(ys, 1)


@pytest.mark.parametrize(("mode", "extra"), list(product(MODES, EXTRAS)))
def test_a_run_is_read_as_the_function_that_it_is(tmp_path, mode, extra):
    run = build_run(tmp_path / "run", **MODES[mode][0], **EXTRAS[extra])
    coder, x = read_eleuther(run).double(), inputs()
    wanted = reference(run, array(x))
    assert type(coder.decoder.settings) is MODES[mode][1]
    assert array(coder(x)) == pytest.approx(wanted, abs=1e-12)
    assert array(layer_by_layer(coder, x)) == pytest.approx(wanted, abs=1e-12)


def test_what_a_run_says_of_itself_is_kept(tmp_path):
    run = build_run(tmp_path, **UNTIED, skip_connection=True)
    (run / "config.json").write_text(json.dumps({"model": "some/model", "revision": "main", "lr": 1e-3}))
    coder = read_eleuther(run)
    assert coder.provenance == Provenance("some/model", "main", read="mlp_in")
    assert (coder.wiring, coder.skip) == (Wiring(L, 3), Wiring(L, 3))
    assert coder.sparsity == TopK(K, anneal_from=1.0, anneal_share=0.0)
    assert coder.decoder.settings == Full(offset=True)
    assert not coder.first_write.any()


@pytest.mark.parametrize(
    ("mode", "wiring", "skip"),
    [
        (PLAIN, Wiring.per_layer(L), Wiring.per_layer(L)),
        ({"span": 1}, Wiring.per_layer(L), Wiring.per_layer(L)),
        (SOURCE, Wiring(L, 3), Wiring(L, 3)),
        (CONCAT, Wiring(L, 3), Wiring.per_layer(L)),
        (PER_LAYER, Wiring(L, 3), Wiring.per_layer(L)),
    ],
    ids=str,
)
def test_wirings_follow_the_mode(tmp_path, mode, wiring, skip):
    coder = read_eleuther(build_run(tmp_path, **mode, skip_connection=True))
    assert (coder.wiring, coder.skip) == (wiring, skip)


def test_topk_coalesced_keeps_its_k(tmp_path):
    assert read_eleuther(build_run(tmp_path, **COALESCED)).decoder.settings.topk_coalesced == K


def test_a_post_encoder_that_does_nothing_is_left_out(tmp_path):
    run = build_run(tmp_path, **UNTIED, post_encoder_scale=True)
    for layer in range(L):
        edit_tensors(run, layer, lambda t: t.update({n: torch.zeros(F) for n in t if n.startswith("post_encs")}))
        edit_tensors(run, layer, lambda t: t.update({n: torch.ones(F) for n in t if n.startswith("post_enc_scales")}))
    coder = read_eleuther(run).double()
    assert coder.decoder.settings == Full()
    assert array(coder(inputs())) == pytest.approx(reference(run, array(inputs())), abs=1e-12)


def test_layers_are_in_the_order_of_their_numbers(tmp_path):
    run, x = build_run(tmp_path, n_layers=11, span=2), inputs(11)
    assert array(read_eleuther(run).double()(x)) == pytest.approx(reference(run, array(x)), abs=1e-12)


def test_the_parent_project_has_no_post_encoder(tmp_path):
    run = build_run(tmp_path, skip_connection=True)
    wanted = reference(zero_post_encoders(run), array(inputs()))
    for layer in range(L):
        edit_tensors(run, layer, lambda t: t.pop("post_enc"))
        edit_cfg(run, layer, lambda c: [c.pop(n) for n in ("train_post_encoder", "n_targets", "n_sources")])
        edit_cfg(run, layer, lambda c: c.update(multi_topk=False))
    coder = read_eleuther(run).double()
    assert coder.decoder.settings == Full()
    assert array(coder(inputs())) == pytest.approx(wanted, abs=1e-12)


def test_copies_of_the_own_layers_tensors_may_be_left_out(tmp_path):
    run = build_run(tmp_path, **UNTIED)
    wanted = read_eleuther(run)(inputs().float())
    edit_tensors(run, 0, lambda t: [t.pop(name) for name in ("W_dec", "b_dec")])
    assert torch.equal(read_eleuther(run)(inputs().float()), wanted)


def test_16_bit_weights_are_read(tmp_path):
    run = build_run(tmp_path, **UNTIED)
    wanted = read_eleuther(run)(inputs().float())
    for layer in range(L):
        edit_tensors(run, layer, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    assert torch.equal(read_eleuther(run)(inputs().float()), wanted)


@pytest.mark.parametrize(
    ("config", "read", "site"),
    [
        ({}, None, "mlp_in"),
        ({}, "resid", "resid"),
        ({"hookpoints_in": [f"h.{i}.ln_2" for i in range(L)]}, None, "resid"),
        ({"hookpoints_in": [f"h.{i}.post_attention_layernorm" for i in range(L)]}, None, "resid"),
        ({"hookpoints_in": [f"h.{i}.mlp" for i in range(L)]}, None, "mlp_in"),
        ({"hookpoints_in": [f"h.{i}.attn" for i in range(L)]}, "mlp_in", "mlp_in"),
    ],
)
def test_the_site_is_where_they_hooked(tmp_path, config, read, site):
    run = build_run(tmp_path)
    hookpoints = [f"h.{i}.mlp" for i in range(L)]
    (run / "config.json").write_text(json.dumps({"hookpoints": hookpoints, **config}))
    assert read_eleuther(run, read).provenance.read == site


def edit_tensors(run: Path, layer: int, change: Callable) -> None:
    file = run / f"h.{layer}.mlp" / "sae.safetensors"
    tensors = read_tensors(file)[0]
    change(tensors)
    save_file(tensors, file)


def edit_cfg(run: Path, layer: int, change: Callable) -> None:
    file = run / f"h.{layer}.mlp" / "cfg.json"
    cfg = read_json(file)
    change(cfg)
    file.write_text(json.dumps(cfg))


def zero_post_encoders(run: Path) -> Path:
    for layer in range(L):
        edit_tensors(run, layer, lambda t: t.update(post_enc=torch.zeros(F)))
    return run


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("encoder.bias"), "tensor encoder.bias is missing"),
        (lambda t: t.pop("W_decs.1"), "tensor W_decs.1 is missing"),
        (lambda t: t.pop("post_encs.0"), "tensor post_encs.0 is missing"),
        (lambda t: t.pop("W_skips.1"), "tensor W_skips.1 is missing"),
        (lambda t: t.pop("in_norm"), "tensor in_norm is missing"),
        (lambda t: t.update(out_norm=torch.zeros(1)), r"out_norm is 0.0; a length above 0"),
        (lambda t: t.update({"b_decs.1": torch.zeros(5)}), r"tensor b_decs.1 has shape \[5\]; \[4\] is wanted"),
        (lambda t: t.update({"encoder.weight": torch.zeros(D, F)}), r"encoder.weight has shape \[4, 12\]; \[12, 4\]"),
        (lambda t: t.update({"W_decs.2": torch.zeros(F, D)}), "tensor W_decs.2 is in the run but"),
        (lambda t: t.update({"W_dec": torch.zeros(F, D)}), "tensor W_dec differs from W_decs.0"),
    ],
)
def test_wrong_tensors_are_named_with_their_file(tmp_path, change, named):
    run = build_run(tmp_path, **UNTIED, skip_connection=True, normalize_io=True)
    edit_tensors(run, 2, change)
    with pytest.raises(UserError, match=f"h.2.mlp/sae.safetensors: .*{named}"):
        read_eleuther(run)


def test_a_pickle_is_refused(tmp_path):
    run = build_run(tmp_path)
    torch.save({"W_dec": torch.zeros(F, D)}, run / "h.1.mlp" / "sae.safetensors")
    with pytest.raises(UserError, match="h.1.mlp/sae.safetensors: cannot be read"):
        read_eleuther(run)


@pytest.mark.parametrize(
    ("mode", "layer", "change", "named"),
    [
        (PLAIN, 0, {"transcode": False}, "transcode is false, a sparse autoencoder"),
        (PLAIN, 0, {"activation": "batchtopk"}, "batchtopk, which depends on the batch .* --activation topk"),
        (PLAIN, 0, {"activation": "jumprelu"}, "activation is 'jumprelu'"),
        (PLAIN, 0, {"signed": True}, "signed is True, a setting that this version does not know"),
        (PLAIN, 0, {"k": "many"}, "k is 'many'; its type should be int"),
        (PLAIN, 0, {"secondary_target_tied": True}, "secondary_target_tied can only be read with"),
        (PLAIN, 2, {"k": 4}, "k is 4, in h.0.mlp 3"),
        (PLAIN, 2, {"n_targets": 1}, r"tensor W_decs.0 is missing"),
        (UNTIED, 0, {"coalesce_topk": "group"}, "coalesce_topk is 'group'"),
        (UNTIED, 0, {"secondary_target_tied": True}, "secondary_target_tied can only be read with"),
        (BOTH, 0, {"divide_cross_layer": True}, "secondary_target_tied can only be read with"),
        (PER_LAYER, 0, {"topk_coalesced": True}, "topk_coalesced with coalesce_topk per-layer"),
        (CONCAT, 1, {"n_targets": 2}, "tensor post_encs.2 is in the run"),
    ],
    ids=str,
)
def test_settings_without_an_equal_are_named_with_their_file(tmp_path, mode, layer, change, named):
    run = build_run(tmp_path, **mode)
    edit_cfg(run, layer, lambda c: c.update(change))
    with pytest.raises(UserError, match=f"h.{layer}.mlp/.*{named}"):
        read_eleuther(run)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"k": F + 1}, "k is 13, but a layer of 12 features"), ({"activation": "groupmax", "k": 5}, "k to divide")],
    ids=str,
)
def test_a_k_that_does_not_fit_is_named_with_its_file(tmp_path, settings, named):
    with pytest.raises(UserError, match=f"h.0.mlp/cfg.json: .*{named}"):
        read_eleuther(build_run(tmp_path, **settings))


def test_a_span_that_changes_is_named(tmp_path):
    run = build_run(tmp_path, span=3)
    cfg = layer_cfg(2, n_layers=3, span=3)
    (run / "h.2.mlp" / "cfg.json").write_text(json.dumps(cfg))
    save_file(layer_tensors(cfg, 0), run / "h.2.mlp" / "sae.safetensors")
    with pytest.raises(
        UserError, match=r"h.2.mlp/cfg.json: n_targets is 1; layer 2 of 4, .* first has 3, should have 2"
    ):
        read_eleuther(run)


def test_too_few_sources_are_named(tmp_path):
    run = build_run(tmp_path, **PER_LAYER)
    edit_cfg(run, 2, lambda c: c.update(n_sources=2))
    edit_tensors(run, 2, lambda t: t.update(W_dec=torch.zeros(2 * F, D)))
    with pytest.raises(UserError, match="h.2.mlp/cfg.json: n_sources is 2, but 3 layers write to it"):
        read_eleuther(run)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda run: (run / "h.1.mlp/cfg.json").unlink(), "h.1.mlp/cfg.json: no such file"),
        (lambda run: (run / "h.1.mlp/cfg.json").write_text("{"), "h.1.mlp/cfg.json: cannot be read as JSON"),
        (lambda run: (run / "h.1.mlp/cfg.json").write_text("[]"), "h.1.mlp/cfg.json: names no d_in"),
        (lambda run: (run / "h.1.mlp/sae.safetensors").unlink(), "h.1.mlp/sae.safetensors: cannot be read"),
        (lambda run: (run / "h.1.mlp").rename(run / "h.9.mlp"), "has no folder for layer 1"),
        (lambda run: (run / "h.1.mlp").rename(run / "h.mlp"), "h.mlp: its name should hold the number of one layer"),
        (lambda run: (run / "h.1.mlp").rename(run / "h.1"), "h.1: stands in for a whole layer"),
        (lambda run: (run / "h.1.mlp").rename(run / "h.2.attn"), "holds several hookpoints of a layer"),
        (lambda run: (run / "h.1.mlp").rename(run / "h.1.attn"), "holds several hookpoints of a layer"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json: holds a list"),
        (lambda run: (run / "config.json").write_text('{"hookpoints": ["h.4.mlp"]}'), "holds no h.4.mlp, which its"),
        (lambda run: (run / "config.json").write_text('{"hookpoints_in": ["h.0.x"]}'), "hookpoints_in is h.0.x, ..."),
    ],
)
def test_damaged_runs_are_named(tmp_path, damage, named):
    run = build_run(tmp_path)
    damage(run)
    with pytest.raises(UserError, match=named):
        read_eleuther(run)


def test_folders_without_a_run_are_named(tmp_path):
    with pytest.raises(UserError, match="no folder in it holds cfg.json"):
        read_eleuther(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_eleuther(tmp_path / "nowhere")
    with pytest.raises(UserError, match="read is 'logits'; choose one of resid, mlp_in"):
        read_eleuther(build_run(tmp_path), "logits")


def finished(wiring: Wiring, decoder=None, skip: Wiring | None = None, sparsity=None) -> CrossLayerTranscoder:
    """A TopK transcoder in which every parameter is random."""
    torch.manual_seed(4)
    sparsity = sparsity or TopK(K, anneal_from=1.0, anneal_share=0.0)
    coder = CrossLayerTranscoder(wiring, D, F, sparsity, decoder, skip)
    for parameter in coder.parameters():
        parameter.data = torch.randn_like(parameter) / 2
    coder.provenance = Provenance("some/model", "main", "mlp_in")
    return coder


@pytest.mark.parametrize("sparsity", [TopK(K, 1.0, 0.0), GroupMax(K, 1.0, 0.0)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("decoder", [Full(), Full(scale=True), Full(scale=True, offset=True)], ids=str)
@pytest.mark.parametrize("wiring", [Wiring.per_layer(L), Wiring(L, 2), Wiring.full(L)], ids=str)
def test_what_is_written_is_read_again(tmp_path, wiring, decoder, sparsity):
    coder, x = finished(wiring, decoder, skip=wiring, sparsity=sparsity), inputs().float()
    write_eleuther(coder, tmp_path / "run", hookpoint="h.{}.mlp")
    again = read_eleuther(tmp_path / "run")
    assert (again.wiring, again.skip, again.sparsity) == (coder.wiring, coder.skip, coder.sparsity)
    assert (again.decoder.settings, again.provenance) == (decoder, coder.provenance)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in coder.state_dict().items())
    assert torch.equal(again(x), coder(x))
    assert array(coder.double()(inputs())) == pytest.approx(reference(tmp_path / "run", array(inputs())), abs=1e-12)


@pytest.mark.parametrize("extra", ["bare", "skip", "scale"])
@pytest.mark.parametrize("mode", ["plain", "untied", "untied-all"])
def test_what_is_read_is_written_again_tensor_by_tensor(tmp_path, mode, extra):
    run = build_run(tmp_path / "theirs", **MODES[mode][0], **EXTRAS[extra])
    for layer in range(L):
        edit_tensors(run, layer, lambda t: t.update({n: torch.zeros(D) for n in t if for_another_layer(n)}))
    write_eleuther(read_eleuther(run), tmp_path / "ours", hookpoint="h.{}.mlp")
    for layer in range(L):
        theirs, ours = (read_tensors(f / f"h.{layer}.mlp/sae.safetensors")[0] for f in (run, tmp_path / "ours"))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
        theirs, ours = (read_json(f / f"h.{layer}.mlp/cfg.json") for f in (run, tmp_path / "ours"))
        assert {name: ours[name] for name in theirs if name != "n_sources"} == {
            name: value for name, value in theirs.items() if name != "n_sources"
        }


def for_another_layer(name: str) -> bool:
    """Whether a tensor is a source's bias for another layer: what targets get of those is summed when it is read."""
    return name.startswith("b_decs.") and name != "b_decs.0"


def test_a_normalised_and_divided_run_is_written_as_a_simple_one(tmp_path):
    run, x = build_run(tmp_path / "theirs", span=3, **EXTRAS["everything"], divide_cross_layer=True), array(inputs())
    write_eleuther(read_eleuther(run), tmp_path / "ours", hookpoint="h.{}.mlp")
    assert reference(tmp_path / "ours", x) == pytest.approx(reference(run, x), abs=1e-12)


@pytest.mark.parametrize(
    "decoder", [SourceTied(scale=True, offset=True), TargetTied(), SourceAndTargetTied(), LowRank(rank=2)], ids=str
)
def test_every_bank_is_written_as_the_full_one_that_it_amounts_to(tmp_path, decoder):
    coder = finished(Wiring(L, 3), decoder)
    write_eleuther(coder, tmp_path, hookpoint="h.{}.mlp")
    assert isinstance(read_eleuther(tmp_path).decoder.settings, Full)
    assert array(coder.double()(inputs())) == pytest.approx(reference(tmp_path, array(inputs())), abs=1e-5)


def test_a_skip_of_the_own_layer_alone_is_written_with_zeros(tmp_path):
    coder = finished(Wiring(L, 3), skip=Wiring.per_layer(L)).double()
    write_eleuther(coder, tmp_path, hookpoint="h.{}.mlp")
    assert not read_tensors(tmp_path / "h.0.mlp/sae.safetensors")[0]["W_skips.2"].any()
    assert array(coder(inputs())) == pytest.approx(reference(tmp_path, array(inputs())), abs=1e-12)


def test_every_setting_of_theirs_is_written(tmp_path):
    write_eleuther(finished(Wiring(L, 2)), tmp_path)
    assert read_json(tmp_path / "layers.2.mlp" / "cfg.json") == {
        "dtype": "none",
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": F,
        "k": K,
        "skip_connection": False,
        "transcode": True,
        "tp_output": True,
        "n_targets": 2,
        "n_sources": 2,
        "normalize_io": False,
        "divide_cross_layer": False,
        "train_post_encoder": False,
        "post_encoder_scale": False,
        "per_source_tied": False,
        "secondary_target_tied": False,
        "coalesce_topk": "none",
        "topk_coalesced": False,
        "use_fp8": False,
        "d_in": D,
    }


def test_the_site_is_written(tmp_path):
    coder = finished(Wiring.per_layer(L))
    coder.provenance = Provenance(read="resid")
    write_eleuther(coder, tmp_path, hookpoint="h.{}.mlp", norm="h.{}.ln_2")
    assert read_json(tmp_path / "config.json")["hookpoints_in"][3] == "h.3.ln_2"
    assert read_eleuther(tmp_path).provenance.read == "resid"


def test_a_full_folder_is_left_alone_unless_told_otherwise(tmp_path):
    write_eleuther(finished(Wiring.per_layer(L)), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    smaller = finished(Wiring.full(2))
    with pytest.raises(UserError, match="is not empty"):
        write_eleuther(smaller, tmp_path)
    write_eleuther(smaller, tmp_path, overwrite=True)
    assert read_eleuther(tmp_path).wiring == Wiring.full(2)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("coder", "named"),
    [
        (lambda: finished(Wiring.full(L)).with_thresholds(torch.ones(L, F)), "JumpReLU, .* no place for thresholds"),
        (lambda: finished(Wiring.full(L), sparsity=JointTopK(3)), "sparsity is JointTopK"),
        (lambda: finished(Wiring(L, 2, 1)), "first_target is 1"),
        (lambda: finished(Wiring(L, 2), skip=Wiring.full(L)), "skip connection from layer 0 to 2 has no place"),
        (lambda: finished(Wiring.full(L), TargetTied(topk_coalesced=3)), "topk_coalesced makes"),
        (lambda: finished(Wiring.full(L)).unfold(torch.ones(L), torch.ones(L)), "still in training"),
    ],
)
def test_what_cannot_be_held_is_refused_before_anything_is_written(tmp_path, coder, named):
    with pytest.raises(UserError, match=named):
        write_eleuther(coder(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_names_without_a_place_for_the_layer_are_refused(tmp_path):
    with pytest.raises(UserError, match="hookpoint is 'mlp' .* both need a {}"):
        write_eleuther(finished(Wiring.full(L)), tmp_path, hookpoint="mlp")
