"""Per-layer transcoders trained elsewhere: folders of real torch modules, against those modules and numpy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from crosslayer import CrossLayerTranscoder, ReLU, ReplacementModel, UserError, Wiring, evaluate, load_data, train
from crosslayer.activations.capture import capture_all
from crosslayer.coders.input_norm import LayerNorm
from crosslayer.formats import read_layered_plt, write_circuit_tracer, write_eleuther
from crosslayer.models.hooks import reading, replacing
from crosslayer.models.prompts import prepare
from crosslayer.options import TrainOptions
from making import array, text_examples
from test_cli import check_refused, run  # noqa: F401, a fixture

F, D = 24, 32


class PLT(nn.Module):
    """The module that such files come from."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.enc = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, F), nn.ReLU())
        self.dec = nn.Linear(F, D, bias=bias)
        for parameter in self.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)

    def forward(self, x):
        return self.dec(self.enc(x))


def build(folder: Path, n: int = 2, *, name="layer_{}.pt", dtype=torch.float32, bias=True, start=0) -> list[PLT]:
    """A folder of n transcoders, and the modules in it."""
    torch.manual_seed(3)
    plts = [PLT(bias).to(dtype).requires_grad_(False) for _ in range(n)]
    folder.mkdir(parents=True, exist_ok=True)
    for layer, plt in enumerate(plts, start):
        file = folder / name.format(layer)
        save_file(plt.state_dict(), file) if file.suffix == ".safetensors" else torch.save(plt.state_dict(), file)
    return plts


def in_numpy(plt: PLT, x: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """LayerNorm, encoder, ReLU and decoder in float64, from their definitions."""
    w = {name: array(tensor) for name, tensor in plt.state_dict().items()}
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w["enc.0.weight"] + w["enc.0.bias"]
    acts = np.maximum(normed @ w["enc.1.weight"].T + w["enc.1.bias"], 0)
    return acts @ w["dec.weight"].T + w.get("dec.bias", 0)


def inputs(L: int, n: int = 50) -> torch.Tensor:
    """Tokens of very different norms and means."""
    x = torch.randn(n, L, D, generator=torch.Generator().manual_seed(4))
    return x * torch.logspace(-3, 2, n)[:, None, None] + 0.1


@pytest.mark.parametrize("name", ["layer_{}.pt", "plt-L{}-f8192.pth", "{}.bin", "L{:02}.safetensors"])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_run_computes_what_the_modules_do(tmp_path, name, offset):
    plts = build(tmp_path, 12, name=name)
    coder, x = read_layered_plt(tmp_path, target_offset=offset), inputs(12 + offset)
    assert coder.wiring == Wiring(12 + offset, 1, offset)
    y = array(coder.double()(x.double()))
    for layer, plt in enumerate(plts):
        wanted = in_numpy(plt, array(x[:, layer]))
        assert y[:, layer + offset] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        assert array(plt(x[:, layer])) == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    assert not y[:, :offset].any()


def test_saved_is_loaded(tmp_path):
    build(tmp_path / "plts")
    coder, x = read_layered_plt(tmp_path / "plts", norm_eps=1e-3), inputs(3)
    coder.save(tmp_path / "run")
    record, again = (
        json.loads((tmp_path / "run" / "config.json").read_text()),
        CrossLayerTranscoder.load(tmp_path / "run"),
    )
    assert record["input_norm"] == {"kind": "layer-norm", "eps": 1e-3}
    assert record["kept_layers"] == [0]
    assert (again.input_norm, again.kept_layers) == (LayerNorm(1e-3), (0,))
    assert torch.equal(again(x), coder(x))


def test_a_run_of_before_has_no_norm_and_keeps_no_mlp(tmp_path):
    CrossLayerTranscoder(Wiring.full(2), D, F, ReLU()).save(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    assert (record.pop("input_norm"), record.pop("kept_layers")) == (None, [])
    (tmp_path / "config.json").write_text(json.dumps(record))
    old = CrossLayerTranscoder.load(tmp_path)
    assert (old.input_norm, old.kept_layers) == (None, ())


def test_evaluation_is_that_of_numpy(llava, tmp_path):
    plts, data = build(tmp_path), load_data("emoji-scenes", split="test", n=5, model=llava)
    result = evaluate(llava, read_layered_plt(tmp_path), data, max_new_tokens=2)
    batch = prepare(llava.model, llava.processor, list(data))
    x, y = (array(part[batch.position > 0]) for part in capture_all(llava, batch))
    wanted = [
        ((y[:, t] - in_numpy(plts[t - 1], x[:, t - 1])) ** 2).sum() / ((y[:, t] - y[:, t].mean(0)) ** 2).sum()
        for t in (1, 2)
    ]
    found = result.layers["all"]
    assert [figures.fvu.value for figures in found[1:]] == pytest.approx(wanted, rel=1e-4)
    assert result.fvu.value == pytest.approx(np.mean(wanted), rel=1e-4)
    assert np.isnan(found[0].fvu.value)
    assert found[2].l0.value == 0 < found[0].l0.value


@pytest.mark.parametrize("unwritten", ["keep", "zero"])
def test_a_replacement_model_is_the_model_with_the_modules_in_place(llava, tmp_path, unwritten):
    plts = build(tmp_path)
    coder = read_layered_plt(tmp_path, unwritten=unwritten)
    coder.first_write.normal_()
    batch = prepare(llava.model, llava.processor, list(load_data("emoji-scenes", n=3, model=llava)))
    seen = {}

    def write(layer: int) -> torch.Tensor:
        ours = plts[layer - 1](seen[layer - 1]) if layer else torch.zeros_like(seen[0])
        return torch.where((batch.position == 0)[..., None], coder.first_write[layer], ours)

    kept = [0] if unwritten == "keep" else []
    with torch.no_grad(), reading(llava.sites, seen.__setitem__), replacing(llava.sites, write, kept):
        wanted = llava.model(**batch.inputs, use_cache=False).logits
    found = ReplacementModel(llava, coder).logits(batch)
    real = batch.attention
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-3, atol=1e-3)


def test_a_kept_mlp_is_computed_and_the_others_are_not(llama, tmp_path):
    build(tmp_path)
    called = []
    for layer, site in enumerate(llama.sites.layers):
        original, site.mlp.gate_proj.forward = site.mlp.gate_proj.forward, None
        site.mlp.gate_proj.forward = lambda x, i=layer, f=original: (called.append(i), f(x))[1]
    try:
        ReplacementModel(llama, read_layered_plt(tmp_path)).generate("a cat", max_new_tokens=1)
    finally:
        for site in llama.sites.layers:
            del site.mlp.gate_proj.forward
    assert called == [0]


def test_only_a_layer_without_a_source_can_keep_its_mlp():
    with pytest.raises(UserError, match="kept_layers names layer 1; only one that no source writes to"):
        CrossLayerTranscoder(Wiring.full(3, 1), D, F, ReLU(), kept_layers=[1])


def test_half_precision_is_kept_in_full(tmp_path):
    plts = build(tmp_path, dtype=torch.bfloat16)
    coder, x = read_layered_plt(tmp_path), inputs(3)
    assert {tensor.dtype for tensor in coder.state_dict().values()} == {torch.float32}
    wanted = in_numpy(plts[0], array(x[:, 0]))
    assert array(coder(x)[:, 1]) == pytest.approx(wanted, rel=1e-3, abs=1e-3)


def test_a_decoder_may_lack_its_bias_in_all_files_alike(tmp_path):
    plts, x = build(tmp_path, bias=False), inputs(3)
    wanted = in_numpy(plts[1], array(x[:, 1]))
    assert array(read_layered_plt(tmp_path)(x)[:, 2]) == pytest.approx(wanted, rel=1e-3, abs=1e-3)
    torch.save(PLT().state_dict(), tmp_path / "layer_1.pt")
    with pytest.raises(UserError, match=r"layer_1.pt: tensor dec.bias is in the run"):
        read_layered_plt(tmp_path)


def test_other_names(tmp_path):
    build(tmp_path)
    for file in tmp_path.iterdir():
        state = torch.load(file, weights_only=True)
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, file)
    with pytest.raises(UserError, match=r"layer_0.pt: .*enc.1.weight.*it holds module.enc.0.weight, .*--names"):
        read_layered_plt(tmp_path)
    read_layered_plt(tmp_path, names=("module.enc.0", "module.enc.1", "module.dec"))


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["layer_0.pt", "layer_2.pt"], "has no file of layer 1, but layer_2.pt"),
        (["layer_1.pt", "layer_2.pt"], "has no file of layer 0"),
        (["layer_0.pt", "layer_1.pt", "layer_01.pt"], "layer_01.pt and layer_1.pt are both of layer 1"),
        (["layer_0.pt", "layer_0.safetensors"], "layer_0.pt and layer_0.safetensors are both of layer 0"),
        (["layer_0.pt", "layer_1.pt", "optimizer.pt"], "optimizer.pt: its name should hold its layer's number"),
        (["L0-step10.pt", "L1-step20.pt"], "L1-step20.pt: several numbers"),
        ([], "holds no .pt, .pth, .bin, .safetensors file"),
    ],
)
def test_which_file_is_which_layers(tmp_path, files, named):
    for name in files:
        build(tmp_path, 1, name=name)
    with pytest.raises(UserError, match=named):
        read_layered_plt(tmp_path)


def test_layers_are_in_natural_order(tmp_path):
    plts, x = build(tmp_path, 11), inputs(12)
    assert array(read_layered_plt(tmp_path)(x)[:, 11]) == pytest.approx(
        in_numpy(plts[10], array(x[:, 10])), rel=1e-2, abs=1e-3
    )


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"dec.weight": None}, "tensor dec.weight is missing"),
        ({"dec.weight": torch.zeros(F, D)}, r"tensor dec.weight has shape \[24, 32\]; \[32, 24\] is wanted"),
        ({"W_skip": torch.zeros(D, D)}, "tensor W_skip is in the run but .* has no place"),
        ({"enc.1.weight": torch.zeros(F, D, dtype=torch.int8)}, "enc.1.weight is torch.int8, no tensor of weights"),
        ({"optimizer": {"lr": 0.1}}, "optimizer is dict, no tensor of weights; save the state dict alone"),
    ],
)
def test_what_is_in_a_file(tmp_path, content, named):
    build(tmp_path)
    state = {**PLT().state_dict(), **content}
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "layer_1.pt")
    with pytest.raises(UserError, match=f"layer_1.pt: {named}"):
        read_layered_plt(tmp_path)


def test_nothing_is_unpickled(tmp_path):
    build(tmp_path)
    torch.save(PLT(), tmp_path / "layer_1.pt")
    with pytest.raises(UserError, match=r"layer_1.pt: is no state dict, or is damaged \(UnpicklingError\)"):
        read_layered_plt(tmp_path)
    whole = (tmp_path / "layer_0.pt").read_bytes()
    (tmp_path / "layer_1.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="layer_1.pt: is no state dict, or is damaged"):
        read_layered_plt(tmp_path)
    torch.save([1], tmp_path / "layer_1.pt")
    with pytest.raises(UserError, match="layer_1.pt: holds a list"):
        read_layered_plt(tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_offset": 2}, "target_offset is 2"),
        ({"unwritten": "mean"}, "unwritten is 'mean'"),
        ({"norm_eps": 0.0}, "eps is 0.0"),
        ({"read": "output"}, "read is 'output'"),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, named):
    build(tmp_path)
    with pytest.raises(UserError, match=named):
        read_layered_plt(tmp_path, **settings)


def test_no_other_format_has_a_place_for_the_norm(tmp_path):
    build(tmp_path / "plts")
    coder = read_layered_plt(tmp_path / "plts")
    for write in (write_circuit_tracer, write_eleuther):
        with pytest.raises(UserError, match="LayerNorm"):
            write(coder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gradients_pass_the_norm(tmp_path):
    plt = build(tmp_path, 1)[0].double()
    coder = read_layered_plt(tmp_path, target_offset=0).double().requires_grad_(True)
    coder.unfold(torch.tensor([7.0]).double(), torch.tensor([3.0]).double())
    x = (inputs(1) + 1).double().requires_grad_(True)
    torch.testing.assert_close(coder(x)[:, 0], plt(x[:, 0]), rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (coder(x), plt(x))]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)


def test_finetuning_goes_on_from_it_and_keeps_the_norm(llama, tmp_path):
    build(tmp_path / "plts")
    read_layered_plt(tmp_path / "plts").save(tmp_path / "run")
    start = CrossLayerTranscoder.load(tmp_path / "run")
    options = TrainOptions(model="tiny", data="text", out=tmp_path, tokens=12_000, batch_tokens=250, learning_rate=1e-2)
    data = text_examples(60)
    tuned = train(llama, data, options.config(3, start, 0), tmp_path / "tuned", start=tmp_path / "run")
    assert (tuned.input_norm, tuned.kept_layers) == (LayerNorm(), (0,))
    fvu = [evaluate(llama, coder, text_examples(5), max_new_tokens=1).fvu.value for coder in (start, tuned)]
    assert fvu[1] < 0.5 * fvu[0]


def test_the_command_line(run, llama_folder, tmp_path):  # noqa: F811, the fixture
    build(tmp_path / "plts")
    (tmp_path / "text.txt").write_text("a cat and a dog .\n" * 40)
    line = ["import", "layered-plt", tmp_path / "plts", "--out", tmp_path / "run"]
    code, out, err = run(*line, "--model", llama_folder, "--data", tmp_path / "text.txt")
    assert code == 0, err
    assert "encoders read x through a LayerNorm(eps=1e-05)" in out
    assert "layer 0: no feature writes to it; its original MLP is kept" in out
    assert "layer 2: has no features" in out
    assert CrossLayerTranscoder.load(tmp_path / "run").first_write.any()
    code, out, err = run("evaluate", tmp_path / "run", tmp_path / "text.txt", "--prompts", 3)
    assert code == 0, err
    assert "its original MLP is kept" in out
    assert run("generate", tmp_path / "run", "--prompt", "a cat", "--max-new-tokens", 2)[0] == 0
    check_refused(run(*line), "already exists")
    assert f"next: crosslayer evaluate {tmp_path / 'run'} --model MODEL" in run(*line, "--overwrite")[1]
    foreign = ["import", "gemma-scope", tmp_path / "plts", "--out", tmp_path / "other", "--names", "a", "b", "c"]
    check_refused(run(*foreign), "--names is given, but gemma-scope has no use for it")
