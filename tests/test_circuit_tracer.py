"""circuit-tracer's folders, and Gemma Scope 2's: built here file by file, against their formulas in numpy, and back."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from safetensors.torch import save_file

from crosslayer import CrossLayerTranscoder, JointTopK, JumpReLU, ReLU, TopK, UserError, Wiring
from crosslayer.coders.decoders import Full, LowRank, SourceAndTargetTied, SourceTied, TargetTied
from crosslayer.coders.transcoder import Provenance
from crosslayer.files import read_tensors
from crosslayer.formats import read_circuit_tracer, read_gemma_scope, write_circuit_tracer
from making import array

L, D, F, N = 4, 6, 10, 30
CONFIG = {"model_name": "some/model", "feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
WINDOWS = [Wiring.full(L), Wiring(L, 3), Wiring(L, 2), Wiring.full(L, 1), Wiring(L, 2, 1)]
THRESHOLD = "activation_function.threshold"


def inputs() -> torch.Tensor:
    return torch.randn(N, L, D, dtype=torch.double, generator=torch.Generator().manual_seed(3))


def build_clt(path: Path, wiring: Wiring, *, jump: bool = True, **config) -> Path:
    """A cross-layer folder in their layout, with zeros where a wiring has no decoder."""
    generator = torch.Generator().manual_seed(1)
    path.mkdir(parents=True, exist_ok=True)
    for i in range(L):
        tensors = {"W_enc": random(generator, F, D), "b_enc": random(generator, F), "b_dec": random(generator, D)}
        if jump:
            tensors["threshold"] = random(generator, F).abs()
        if not wiring.n_targets(i):
            tensors = {name: tensor * (name == "b_dec") for name, tensor in tensors.items()}
        save_file({f"{name}_{i}": tensor for name, tensor in tensors.items()}, path / f"W_enc_{i}.safetensors")
        W_dec = random(generator, F, L - i, D)
        W_dec[:, [j for j in range(L - i) if i + j not in wiring.targets(i)]] = 0
        save_file({f"W_dec_{i}": W_dec}, path / f"W_dec_{i}.safetensors")
    (path / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "model_kind": "cross_layer_transcoder", **config}))
    return path


def build_plt(path: Path, *, jump: bool = True, skip: bool = True, **config) -> Path:
    generator = torch.Generator().manual_seed(2)
    path.mkdir(parents=True, exist_ok=True)
    for i in range(L):
        tensors = {"W_enc": random(generator, F, D), "W_dec": random(generator, F, D)}
        tensors |= {"b_enc": random(generator, F), "b_dec": random(generator, D)}
        tensors |= {THRESHOLD: random(generator, F).abs()} if jump else {}
        tensors |= {"W_skip": random(generator, D, D)} if skip else {}
        save_file(tensors, path / f"layer_{i}.safetensors")
    (path / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "model_kind": "transcoder_set", **config}))
    return path


def build_gemma(path: Path, *, affine: bool = True) -> Path:
    generator = torch.Generator().manual_seed(3)
    path.mkdir(parents=True, exist_ok=True)
    for i in range(L):
        tensors = {"w_enc": random(generator, D, F), "w_dec": random(generator, F, L, D)}
        tensors["w_dec"][:, :i] = 0
        tensors |= {"b_enc": random(generator, F), "b_dec": random(generator, D), "threshold": random(generator, F)}
        tensors |= {"affine_skip_connection": random(generator, D, D)} if affine else {}
        save_file(tensors, path / f"params_layer_{i}.safetensors")
    return path


def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator) / 2


def clt_reference(path: Path, x: np.ndarray) -> np.ndarray:
    """What circuit-tracer's CrossLayerTranscoder computes, from its files alone."""
    y = np.zeros_like(x)
    for i in range(L):
        enc, W_dec = load(path / f"W_enc_{i}.safetensors"), load(path / f"W_dec_{i}.safetensors")[f"W_dec_{i}"]
        pre = np.einsum("bd,fd->bf", x[:, i], enc[f"W_enc_{i}"]) + enc[f"b_enc_{i}"]
        acts = pre * (pre > enc.get(f"threshold_{i}", 0))
        y[:, i:] += np.einsum("bf,fld->bld", acts, W_dec)
        y[:, i] += enc[f"b_dec_{i}"]
    return y


def plt_reference(path: Path, x: np.ndarray) -> np.ndarray:
    """What circuit-tracer's TranscoderSet computes, from its files alone."""
    y = np.zeros_like(x)
    for i in range(L):
        w = load(path / f"layer_{i}.safetensors")
        pre = x[:, i] @ w["W_enc"].T + w["b_enc"]
        y[:, i] = pre * (pre > w.get(THRESHOLD, 0)) @ w["W_dec"] + w["b_dec"]
        y[:, i] += x[:, i] @ w["W_skip"].T if "W_skip" in w else 0
    return y


def gemma_reference(path: Path, x: np.ndarray) -> np.ndarray:
    """The published definition: all features to all layers, a ReLU beside the threshold."""
    w = [load(path / f"params_layer_{i}.safetensors") for i in range(L)]
    w_enc, w_dec, b_enc, b_dec, threshold = (
        np.stack([layer[name] for layer in w]) for name in ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
    )
    pre = np.einsum("bld,ldf->blf", x, w_enc) + b_enc
    y = np.einsum("bif,ifod->bod", (pre > threshold) * np.maximum(pre, 0), w_dec) + b_dec
    skip = [layer.get("affine_skip_connection", np.zeros((D, D))) for layer in w]
    return y + np.einsum("bld,ldo->blo", x, np.stack(skip))


def load(file: Path) -> dict[str, np.ndarray]:
    return {name: tensor.astype(float) for name, tensor in load_file(file).items()}


def finished(wiring: Wiring, decoder=None, skip: Wiring | None = None, *, jump=True, read="resid"):
    """A calibrated (or ReLU) transcoder in which every parameter is random."""
    torch.manual_seed(4)
    coder = CrossLayerTranscoder(wiring, D, F, JumpReLU() if jump else ReLU(), decoder, skip)
    for parameter in coder.parameters():
        parameter.data = torch.randn_like(parameter) / 2
    coder.provenance = Provenance("some/model", read=read)
    return coder.with_thresholds(torch.rand(len(coder.sources), F) - 0.3) if jump else coder


@pytest.mark.parametrize("jump", [True, False])
@pytest.mark.parametrize("wiring", WINDOWS, ids=str)
def test_a_cross_layer_folder_is_read_as_the_function_and_the_window_that_it_is(tmp_path, wiring, jump):
    coder = read_circuit_tracer(build_clt(tmp_path, wiring, jump=jump)).double()
    assert coder.wiring == wiring
    assert isinstance(coder.sparsity, JumpReLU if jump else ReLU)
    assert array(coder(inputs())) == pytest.approx(clt_reference(tmp_path, array(inputs())), abs=1e-12)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("jump", [True, False])
def test_a_transcoder_set_is_read_as_the_function_that_it_is(tmp_path, jump, skip):
    coder = read_circuit_tracer(build_plt(tmp_path, jump=jump, skip=skip)).double()
    assert (coder.wiring, coder.skip) == (Wiring.per_layer(L), Wiring.per_layer(L) if skip else None)
    assert array(coder(inputs())) == pytest.approx(plt_reference(tmp_path, array(inputs())), abs=1e-12)


@pytest.mark.parametrize("affine", [True, False])
def test_gemma_scope_is_read_as_the_function_that_it_is(tmp_path, affine):
    coder = read_gemma_scope(build_gemma(tmp_path, affine=affine), "google/gemma-3-1b-pt").double()
    assert coder.provenance == Provenance("google/gemma-3-1b-pt", read="mlp_in")
    assert array(coder(inputs())) == pytest.approx(gemma_reference(tmp_path, array(inputs())), abs=1e-12)


def test_decoders_that_are_all_zero_leave_the_wiring_full(tmp_path):
    build_clt(tmp_path, Wiring.full(L))
    for i in range(L):
        save_file({f"W_dec_{i}": torch.zeros(F, L - i, D)}, tmp_path / f"W_dec_{i}.safetensors")
    assert read_circuit_tracer(tmp_path).wiring == Wiring.full(L)


@pytest.mark.parametrize("jump", [True, False])
@pytest.mark.parametrize("wiring", WINDOWS, ids=str)
def test_a_coder_is_written_as_circuit_tracer_computes_it(tmp_path, wiring, jump):
    coder = finished(wiring, jump=jump).double()
    write_circuit_tracer(coder, tmp_path)
    assert array(coder(inputs())) == pytest.approx(clt_reference(tmp_path, array(inputs())), abs=1e-12)


@pytest.mark.parametrize("jump", [True, False])
@pytest.mark.parametrize("skip", [Wiring.per_layer(L), None], ids=str)
def test_a_plt_is_written_as_circuit_tracer_computes_it(tmp_path, skip, jump):
    coder = finished(Wiring.per_layer(L), skip=skip, jump=jump).double()
    write_circuit_tracer(coder, tmp_path)
    assert array(coder(inputs())) == pytest.approx(plt_reference(tmp_path, array(inputs())), abs=1e-12)


BANKS = [Full(scale=True), SourceTied(scale=True), TargetTied(), SourceAndTargetTied(), LowRank(rank=2)]


@pytest.mark.parametrize("decoder", BANKS, ids=str)
@pytest.mark.parametrize("wiring", [Wiring(L, 3), Wiring.per_layer(L)], ids=str)
def test_every_bank_is_written_as_the_vectors_that_it_amounts_to(tmp_path, wiring, decoder):
    coder = finished(wiring, decoder).double()
    write_circuit_tracer(coder, tmp_path)
    reference = plt_reference if wiring.span == 1 else clt_reference
    assert array(coder(inputs())) == pytest.approx(reference(tmp_path, array(inputs())), abs=1e-12)


@pytest.mark.parametrize("wiring", [*WINDOWS, Wiring.per_layer(L)], ids=str)
def test_what_is_written_is_read_again(tmp_path, wiring):
    coder, x = finished(wiring, skip=wiring if wiring.span == 1 else None), inputs().float()
    coder.thresholds.clamp_(min=0)
    write_circuit_tracer(coder, tmp_path)
    again = read_circuit_tracer(tmp_path)
    assert (again.wiring, again.skip, again.provenance) == (coder.wiring, coder.skip, coder.provenance)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in coder.state_dict().items())
    assert torch.equal(again(x), coder(x))


@pytest.mark.parametrize("jump", [True, False])
@pytest.mark.parametrize("wiring", [*WINDOWS, None], ids=str)
def test_what_is_read_is_written_again_tensor_by_tensor(tmp_path, wiring, jump):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    build_plt(theirs, jump=jump) if wiring is None else build_clt(theirs, wiring, jump=jump)
    write_circuit_tracer(read_circuit_tracer(theirs), ours)
    assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
    for file in theirs.glob("*.safetensors"):
        before, after = read_tensors(file)[0], read_tensors(ours / file.name)[0]
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert yaml.safe_load((ours / "config.yaml").read_text())["feature_input_hook"] == "hook_resid_mid"


@pytest.mark.parametrize(("read", "hook"), [("resid", "hook_resid_mid"), ("mlp_in", "mlp.hook_in")])
def test_the_configuration_says_what_is_read(tmp_path, read, hook):
    write_circuit_tracer(finished(Wiring(L, 2), read=read), tmp_path, scan="some/scan")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config == {
        "model_name": "some/model",
        "model_kind": "cross_layer_transcoder",
        "feature_input_hook": hook,
        "feature_output_hook": "hook_mlp_out" if read == "resid" else "mlp.hook_out",
        "scan": "some/scan",
    }
    assert read_circuit_tracer(tmp_path).provenance.read == read


def test_the_site_can_be_told(tmp_path):
    run = build_plt(tmp_path, feature_input_hook="ln2.hook_normalized")
    with pytest.raises(
        UserError, match="feature_input_hook is 'ln2.hook_normalized', the normalised stream before the"
    ):
        read_circuit_tracer(run)
    assert read_circuit_tracer(run, "mlp_in").provenance.read == "mlp_in"


@pytest.mark.parametrize(
    ("coder", "named"),
    [
        (lambda: untrained(TopK(3)), "sparsity is TopK without fixed thresholds, .* calibrate it first"),
        (lambda: untrained(JointTopK(3)), "sparsity is JointTopK without fixed thresholds"),
        (lambda: untrained(JumpReLU()), "sparsity is JumpReLU without fixed thresholds"),
        (lambda: finished(Wiring.full(L), Full(offset=True)), "decoder has offsets"),
        (lambda: finished(Wiring.full(L), TargetTied(topk_coalesced=2)), "topk_coalesced makes"),
        (lambda: finished(Wiring.full(L), skip=Wiring.per_layer(L)), "has a skip connection"),
        (lambda: finished(Wiring.per_layer(L), skip=Wiring.full(L)), "has a skip connection"),
        (lambda: finished(Wiring.full(L)).unfold(torch.ones(L), torch.ones(L)), "still in training"),
    ],
)
def test_what_cannot_be_held_is_refused_before_anything_is_written(tmp_path, coder, named):
    with pytest.raises(UserError, match=named):
        write_circuit_tracer(coder(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def untrained(sparsity) -> CrossLayerTranscoder:
    return CrossLayerTranscoder(Wiring.full(L), D, F, sparsity).initialise(0)


def test_offsets_of_zero_are_no_offsets(tmp_path):
    coder = finished(Wiring.full(L), Full(offset=True))
    for offset in coder.decoder.offset:
        offset.data.zero_()
    write_circuit_tracer(coder, tmp_path)
    assert read_circuit_tracer(tmp_path).wiring == coder.wiring


def test_a_full_folder_is_left_alone_unless_told_otherwise(tmp_path):
    write_circuit_tracer(finished(Wiring.full(L)), tmp_path)
    (tmp_path / "features").mkdir()
    with pytest.raises(UserError, match="is not empty"):
        write_circuit_tracer(finished(Wiring.per_layer(L)), tmp_path)
    write_circuit_tracer(finished(Wiring.per_layer(L)), tmp_path, overwrite=True)
    assert read_circuit_tracer(tmp_path).wiring == Wiring.per_layer(L)
    assert not list(tmp_path.glob("W_*"))
    assert (tmp_path / "features").is_dir()


def edit(file: Path, change: Callable) -> None:
    tensors = read_tensors(file)[0]
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("W_enc_0", lambda t: t.pop("W_enc_0"), "tensor W_enc_0 is missing"),
        ("W_enc_0", lambda t: t.update(W_enc_0=torch.zeros(F)), r"tensor W_enc_0 has shape \[10\]; a matrix is wanted"),
        ("W_enc_1", lambda t: t.pop("b_dec_1"), "tensor b_dec_1 is missing"),
        ("W_enc_1", lambda t: t.pop("threshold_1"), "tensor threshold_1 is missing"),
        ("W_enc_1", lambda t: t.update(threshold_1=-torch.ones(F)), "tensor threshold_1 goes down to -1, so features"),
        ("W_enc_2", lambda t: t.update(W_enc_2=torch.zeros(D, F)), r"tensor W_enc_2 has shape \[6, 10\]; \[10, 6\]"),
        ("W_enc_2", lambda t: t.update(W_skip_2=torch.zeros(D, D)), "tensor W_skip_2 is in the run"),
        ("W_dec_3", lambda t: t.pop("W_dec_3"), "tensor W_dec_3 is missing"),
        ("W_dec_2", lambda t: t.update(W_dec_2=torch.zeros(F, L, D)), r"tensor W_dec_2 has shape \[10, 4, 6\]"),
    ],
)
def test_wrong_tensors_of_a_cross_layer_folder_are_named(tmp_path, file, change, named):
    build_clt(tmp_path, Wiring.full(L))
    edit(tmp_path / f"{file}.safetensors", change)
    with pytest.raises(UserError, match=f"{file}.safetensors: {named}"):
        read_circuit_tracer(tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("layer_0", lambda t: t.pop("W_enc"), "layer_0.safetensors: tensor W_enc is missing"),
        ("layer_1", lambda t: t.pop("W_dec"), "layer_1.safetensors: tensor W_dec is missing"),
        ("layer_1", lambda t: t.pop("W_skip"), "layer_1.safetensors: tensor W_skip is missing"),
        ("layer_0", lambda t: t.pop("W_skip"), "layer_1.safetensors: tensor W_skip is in the run"),
        ("layer_1", lambda t: t.pop(THRESHOLD), f"layer_1.safetensors: tensor {THRESHOLD} is missing"),
        ("layer_2", lambda t: t.update(b_enc=torch.zeros(D)), r"layer_2.safetensors: tensor b_enc has shape \[6\]"),
        ("layer_2", lambda t: t.update(k=torch.tensor(3)), "layer_2.safetensors: tensor k is in the run"),
    ],
)
def test_wrong_tensors_of_a_transcoder_set_are_named(tmp_path, file, change, named):
    build_plt(tmp_path)
    edit(tmp_path / f"{file}.safetensors", change)
    with pytest.raises(UserError, match=named):
        read_circuit_tracer(tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("params_layer_0", lambda t: t.pop("w_enc"), "tensor w_enc is missing"),
        ("params_layer_1", lambda t: t.pop("threshold"), "tensor threshold is missing"),
        (
            "params_layer_1",
            lambda t: t.update(w_dec=torch.zeros(F, D)),
            r"tensor w_dec has shape \[10, 6\]; \[10, 4, 6\]",
        ),
        ("params_layer_1", lambda t: t.update(w_dec=torch.ones(F, L, D)), "w_dec writes to earlier layers"),
    ],
)
def test_wrong_tensors_of_gemma_scope_are_named(tmp_path, file, change, named):
    build_gemma(tmp_path)
    edit(tmp_path / f"{file}.safetensors", change)
    with pytest.raises(UserError, match=f"{file}.safetensors: .*{named}"):
        read_gemma_scope(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_kind": "sae"}, "model_kind is 'sae'; choose cross_layer_transcoder or transcoder_set"),
        ({"transcoders": ["hf://x/y/z.npz"]}, "transcoders names files elsewhere"),
        ({"activation": "topk", "k": 32}, "activation is 'topk', which there keeps negative features"),
        ({"feature_input_hook": "hook_resid_pre"}, "feature_input_hook is 'hook_resid_pre'; hook_resid_mid"),
        ({"feature_output_hook": "hook_resid_post"}, "feature_output_hook is 'hook_resid_post'"),
    ],
)
def test_wrong_configurations_are_named(tmp_path, change, named):
    with pytest.raises(UserError, match=f"config.yaml: {named}"):
        read_circuit_tracer(build_plt(tmp_path, **change))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "config.yaml").unlink(), "config.yaml: no such file"),
        (lambda f: (f / "config.yaml").write_text("a: [b"), "config.yaml: cannot be read as YAML"),
        (lambda f: (f / "config.yaml").write_text("- a"), "config.yaml: model_kind is None"),
        (lambda f: (f / "config.yaml").write_text("!!python/object/apply:os.getcwd []"), "cannot be read as YAML"),
        (lambda f: (f / "W_dec_1.safetensors").unlink(), "W_dec_1.safetensors: cannot be read"),
        (lambda f: (f / "W_enc_1.safetensors").unlink(), "W_enc_1.safetensors: cannot be read"),
        (lambda f: torch.save({}, f / "W_dec_2.safetensors"), "W_dec_2.safetensors: cannot be read"),
        (lambda f: (f / "W_enc_3.safetensors").unlink(), "W_enc_3.safetensors: cannot be read"),
        (lambda f: [file.unlink() for file in f.glob("W_*")], "holds no W_enc_0.safetensors"),
    ],
)
def test_damaged_folders_are_named(tmp_path, damage, named):
    build_clt(tmp_path, Wiring.full(L))
    damage(tmp_path)
    with pytest.raises(UserError, match=named):
        read_circuit_tracer(tmp_path)


def test_an_unknown_site_is_named(tmp_path):
    with pytest.raises(UserError, match="read is 'logits'"):
        read_circuit_tracer(build_plt(tmp_path), "logits")
