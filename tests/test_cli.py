"""The command line as a user meets it: what each verb prints, and one clear line for every kind of bad input."""

import errno
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from crosslayer import AttributionGraph, CrossLayerTranscoder, Example, UserError, Wiring, cli, load_model
from crosslayer.activations.capture import capture_all
from crosslayer.coders.transcoder import Provenance
from crosslayer.models.prompts import prepare
from crosslayer.training.trainer import Trainer
from crosslayer.verbs import checking
from families import family
from making import finished_coder


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command line; returns exit code, standard output and standard error."""

    def call(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["crosslayer", *map(str, args)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a cat and a dog .\nis there a banana ? yes\n" * 30)
    return path


@pytest.fixture
def train(run, llama_folder, text, tmp_path):
    """`crosslayer train` on the tiny Llama, with small defaults that options override."""

    def call(*options, out="run", data=text):
        small = ["--tokens", 400, "--batch-tokens", 100, "--d-transcoder", 16, "--k", 6]
        return run("train", llama_folder, data, "--out", tmp_path / out, *small, *options)

    return call


def check_refused(result: tuple[int, str, str], *words: object) -> None:
    """Exit code 2 and one line on standard error, after any progress bar, that holds all the words."""
    code, _, err = result
    line = err.strip().splitlines()[-1]
    assert code == 2
    assert line.startswith("crosslayer: ")
    assert "Traceback" not in err
    for word in words:
        assert str(word) in line


def test_train_evaluate_generate(run, train, text, tmp_path):
    assert train()[0] == 0
    folder, figures = tmp_path / "run", tmp_path / "figures.json"
    code, out, _ = run("evaluate", folder, text, "--prompts", 4, "--json", figures)
    assert code == 0
    assert "generation match" in out
    assert 0 <= json.loads(figures.read_text())["top1_agreement"]["value"] <= 1
    code, out, _ = run("generate", folder, "--prompt", "a cat and", "--max-new-tokens", 3)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["original", "replacement"]


def test_a_graph_is_written_summed_up_and_drawn(run, train, tmp_path):
    train()
    command = ["graph", tmp_path / "run", "--prompt", "a cat and", "--out", tmp_path / "graph.json"]
    code, out, err = run(*command, "--circuit-tracer", tmp_path / "viewer")
    assert code == 0, err
    assert "worst row gap" in out
    assert "strongest paths" in out
    graph = AttributionGraph.load(tmp_path / "graph.json")
    assert graph.scores.worst_row_gap < 1e-5
    assert (graph.run, graph.tokens[-1]) == (str(tmp_path / "run"), "and")
    assert "<svg" in (tmp_path / "graph.html").read_text()
    assert (tmp_path / "viewer" / "graph.json").exists()
    check_refused(run(*command), "graph.json", "--overwrite")
    check_refused(run(*command[:-1], tmp_path / "graph.txt"), ".json")
    check_refused(run(*command, "--overwrite", "--target", "cat dog"), "is 2 tokens", "'cat', 'dog'")
    check_refused(run(*command, "--overwrite", "--image", tmp_path / "none.png"), "none.png")
    check_refused(run(*command, "--overwrite", "--circuit-tracer", tmp_path), "graph.json", "another folder")
    assert AttributionGraph.load(tmp_path / "graph.json").scores == graph.scores


def test_a_difference_of_words_is_one_target(run, train, tmp_path):
    train()
    command = ["graph", tmp_path / "run", "--prompt", "a cat and", "--out", tmp_path / "graph.json"]
    assert run(*command, "--target", "cat", "-", "dog", "--max-features", 5)[0] == 0
    graph = AttributionGraph.load(tmp_path / "graph.json")
    assert [node.label for node in graph.nodes if node.kind == "target"] == ['"cat" - "dog"']


def test_a_graph_never_takes_the_place_of_other_files_unasked(run, train, tmp_path):
    train()
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    command = ["graph", tmp_path / "run", "--prompt", "a cat and", "--out"]
    check_refused(run(*command, tmp_path / "run" / "model.json"), "model.safetensors", "already exists")
    (tmp_path / "graph.json").write_text("{}")
    check_refused(run(*command, tmp_path / "of" / "graph.json", "--circuit-tracer", tmp_path), "graph.json")
    assert not (tmp_path / "of").exists()
    (tmp_path / "folder.html").mkdir()
    check_refused(run(*command, tmp_path / "folder.json", "--overwrite"), "folder.html: is a folder")
    assert not (tmp_path / "folder.json").exists()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights


@pytest.fixture
def traced_run(tmp_path, llama_folder):
    """A run of the tiny Llama without training, with so many features that all their edges fit into no memory."""
    return finished_run(llama_folder, tmp_path / "wide", torch.full((3, 5_000), -1e3), 5_000)


def test_what_a_graph_cannot_be_made_of_is_said_in_one_line(run, traced_run, llava_folder, tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (24, 24)).save(picture)

    def refused(*options, words: str, prompt="is there a cat ?"):
        command = ["graph", traced_run, "--out", tmp_path / "graph.json", "--max-features", 3, "--prompt", prompt]
        check_refused(run(*command, *options), *words.split("|"))
        assert not (tmp_path / "graph.json").exists()

    refused("--plain", prompt="", words="the prompt is empty")
    refused(prompt="a " * 200, words="201 tokens|context holds 128; shorten it by 73")
    refused("--image", picture, words="reads no images")
    refused(prompt="<image> a cat", words="1 <image> mark but no image; give the image, or leave the mark out")
    refused(
        "--model",
        llava_folder,
        "--image",
        picture,
        prompt="<image><image> a",
        words="2 <image> marks but 1 image; leave a single",
    )
    refused("--model", "emoji-llava", words="10")
    refused("--target", "cat dog", words="is 2 tokens")
    refused("--target", "feature 3/1 @ 2", words="none of layer 3")
    refused("--target", "feature 1/1 @ 40", words="position 40 is none of")
    refused("--target", "feature 1/1 @ 2", "--check", words="effects on logits|names a feature")
    refused("--token", 1, words="token is 1, but the answer has 1")
    refused("--pool-patches", 2, words="no image patches to pool")
    refused("--max-positions", 0, words="budget of positions is 0")
    refused("--probability", 95, words="probability is 95.0; choose more than 0, at most 1")
    refused("--logits", 0, words="0 of the likeliest tokens|at least 1")
    refused("--node-threshold", 80, words="node_threshold is 80.0")
    refused("--target", "cat", "-", words="target '\"cat\" - ' is")
    refused(
        "--max-features",
        10**9,
        prompt="a cat and a dog . " * 15,
        words="of memory|TiB|are free|--max-features, --max-positions or --pool-patches",
    )


def test_a_graph_is_checked_beside_another_run(run, train, tmp_path):
    train()
    train("--span", 1, out="plt")
    command = ["graph", tmp_path / "run", "--prompt", "is there a cat and", "--out", tmp_path / "graph.json"]
    check_refused(run(*command, "--beside", tmp_path / "plt"), "--beside", "without --check")
    check_refused(run(*command, "--check", "--beside", tmp_path / "none"), "none")
    assert not list(tmp_path.glob("graph.*"))
    code, out, _ = run(*command, "--check", "--beside", tmp_path / "plt")
    assert code == 0
    assert "direct edge under freeze, worst gap" in out
    record = json.loads((tmp_path / "graph.check.json").read_text())
    assert [check["run"] for check in record["checks"]] == [str(tmp_path / "run"), str(tmp_path / "plt")]
    assert all(check["worst_frozen_gap"] < 1e-3 for check in record["checks"])
    assert (tmp_path / "graph.check.png").exists()


def finished_run(model: Path, out: Path, thresholds: torch.Tensor, F: int) -> Path:
    """A run without training, with thresholds given."""
    coder = finished_coder(Wiring.full(3), F=F).with_thresholds(thresholds)
    coder.provenance = Provenance(str(model))
    coder.save(out)
    return out


def test_a_graph_of_pooled_patches_is_checked(run, llava_folder, tmp_path):
    Image.new("RGB", (48, 96), "teal").save(tmp_path / "picture.png")
    folder = finished_run(llava_folder, tmp_path / "run", torch.rand(3, 12), 12)
    command = ["graph", folder, "--prompt", "is there a cat ?", "--image", tmp_path / "picture.png"]
    code, out, err = run(*command, "--pool-patches", 1, "--check", "--out", tmp_path / "graph.json")
    assert code == 0, err
    assert out.index("pruned, as shown in") < out.index("direct edge under freeze, worst gap")
    found = json.loads((tmp_path / "graph.check.json").read_text())["checks"][0]
    assert found["worst_frozen_gap"] < 1e-3
    assert any("at cell 0" in feature["caption"] for feature in found["features"])


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (UserError("no more memory"), 2)])
def test_a_graph_is_there_when_its_check_is_cut_short(run, llama_folder, tmp_path, monkeypatch, stop, code):
    def stopped(*args):
        raise stop

    folder = finished_run(llama_folder, tmp_path / "run", torch.rand(3, 12), 12)
    command = ["graph", folder, "--prompt", "is there a cat ?", "--check", "--out", tmp_path / "graph.json"]
    assert run(*command)[0] == 0
    monkeypatch.setattr(checking, "faithfulness", stopped)
    assert run(*command, "--overwrite", "--target", "cat")[0] == code
    assert [n.label for n in AttributionGraph.load(tmp_path / "graph.json").nodes if n.kind == "target"] == ["cat"]
    assert 'output \\"cat\\"' in (tmp_path / "graph.html").read_text()
    assert not list(tmp_path.glob("graph.check.*"))


def test_a_graph_that_cannot_be_checked_is_not_written(run, llama_folder, tmp_path):
    folder = finished_run(llama_folder, tmp_path / "run", torch.full((3, 3), 1e3).fill_diagonal_(0.0), 3)
    command = ["graph", folder, "--plain", "--prompt", "cat", "--out", tmp_path / "graph.json"]
    check_refused(run(*command, "--check"), "the graph has 1 features", "at least 3")
    assert not list(tmp_path.glob("graph.*"))
    assert run(*command)[0] == 0


def test_inspect_prints_sites_gaps_and_wiring(run, llava_folder):
    code, out, _ = run("inspect", llava_folder, "--span", 2)
    assert code == 0
    assert "model.language_model.layers.2.mlp" in out
    assert "span 2, first_target 0, 5 decoders" in out


def test_inspect_needs_no_tokenizer_and_prints_what_is_unusual(run, tmp_path):
    family("qwen3_next").save_pretrained(tmp_path)
    code, out, _ = run("inspect", tmp_path, "--dtype", "bf16")
    assert code == 0
    assert "note            linear attention in layers 0: attention patterns cannot be frozen there" in out
    assert "torch.bfloat16" in out


def test_a_dry_run_needs_no_weights_and_a_training_does(run, text, llava, tmp_path):
    llava.model.config.save_pretrained(tmp_path)
    train = ["train", tmp_path, text, "--out", tmp_path / "run"]
    code, out, _ = run(*train, "--dry-run")
    assert code == 0
    assert "time: capturing" in out
    check_refused(run(*train), tmp_path, "cannot be loaded")


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_help_explains_every_option(run, verb):
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert "(required)" in out or "(default" in out


def test_unknown_model(run, tmp_path):
    check_refused(run("inspect", tmp_path / "nothing"), tmp_path / "nothing", "emoji-llava")
    check_refused(run("inspect", "no-such-model"), "no-such-model", "emoji-llava")
    check_refused(run("inspect", tmp_path), tmp_path, "config.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--k", 1000], ["k is 1000", "48"]),
        (["--k", 0], ["k is 0"]),
        (["--span", 4], ["span is 4", "1 to 3"]),
        (["--span", 0], ["span is 0"]),
        (["--first-target", 2], ["first_target is 2"]),
        (["--first-target", 1, "--span", 3], ["span is 3", "1 to 2"]),
        (["--tokens", 0], ["tokens is 0"]),
        (["--sparsity", "dense"], ["'dense'", "joint-topk"]),
        (["--sparsity", "relu"], ["relu", "k"]),
        (["--penalty", 1], ["batch-topk", "coefficient"]),
        (["--read", "output"], ["'output'", "resid"]),
        (["--resume"], ["resume", "without --resume"]),
    ],
)
def test_settings_that_cannot_work(train, tmp_path, options, words):
    check_refused(train(*options), *words)
    assert not (tmp_path / "run").exists()


def test_data_that_is_none(train, tmp_path):
    empty, broken = tmp_path / "empty.txt", tmp_path / "broken.jsonl"
    empty.write_text("\n\n")
    broken.write_text('{"prompt": "a cat"}\nnot json\n')
    check_refused(train(data=tmp_path / "nothing.txt"), "nothing.txt", "emoji-scenes")
    check_refused(train(data=empty), "empty.txt", "no examples")
    check_refused(train(data=broken), "broken.jsonl:2", "not JSON")
    assert not (tmp_path / "run").exists()


def test_image_that_is_none(run, train, tmp_path):
    train()
    fake = tmp_path / "fake.png"
    fake.write_text("not a picture")
    ask = ["generate", tmp_path / "run", "--prompt", "a cat", "--image"]
    check_refused(run(*ask, fake), "fake.png", "not an image")
    check_refused(run(*ask, tmp_path / "missing.png"), "missing.png", "no such image")


def test_output_that_exists(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    check_refused(train(), "--overwrite")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"
    assert train("--overwrite")[0] == 0
    assert (tmp_path / "run" / "config.json").is_file()
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_run_that_is_none(run, tmp_path):
    check_refused(run("evaluate", tmp_path / "nothing"), "nothing", "no such run")
    check_refused(run("evaluate", tmp_path), "config.json")


def test_full_disk_keeps_the_last_state(train, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    check_refused(train(), "No space left on device")
    assert not [path for path in (tmp_path / "run").iterdir() if path.name != "metrics.jsonl"]


def test_loss_that_is_no_number_names_the_layer_and_keeps_the_last_good_state(train, tmp_path, monkeypatch):
    step = Trainer.step

    def poisoned(self, batch):
        if self.step_number == 2:
            batch.tokens.y[:, 1] = torch.nan
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", poisoned)
    check_refused(train(), "step 3", "layer 1's target")
    monkeypatch.setattr(Trainer, "step", step)
    assert train("--resume")[0] == 0


def test_unknown_option_is_not_ignored(train):
    code, _, err = train("--cross-leyer", 3)
    assert code == 2
    assert "--cross-leyer" in err


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--max-new-tokens", 0], "max_new_tokens is 0"), (["--temperature", -1], "temperature is -1.0")],
)
def test_generation_settings_that_cannot_work(run, tmp_path, options, word):
    check_refused(run("generate", tmp_path, "--prompt", "a cat", *options), word)


@pytest.mark.parametrize("option", ["--tokens", "--prompts"])
def test_a_demo_of_nothing_leaves_nothing(run, tmp_path, option):
    check_refused(run("demo", "--out", tmp_path / "out", option, 0), "is 0")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_the_cost_and_trains_nothing(train, tmp_path):
    code, out, _ = train("--dry-run")
    assert code == 0
    assert all(word in out for word in ("parameters", "memory: moments", "disk: at most", "time: training steps"))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_that_does_not_fit_says_what_would(train):
    code, out, _ = train("--dry-run", "--d-transcoder", 500_000_000, "--batch-tokens", 1)  # more than any machine has
    assert code == 0
    assert "does not fit into memory; what would: --" in out


def test_several_seeds_train_a_run_each(train, tmp_path):
    code, out, _ = train("--seed", 3, 4)
    assert code == 0
    assert out.count("trained on") == 2
    weights = [(tmp_path / "run" / f"seed-{n}" / "model.safetensors").read_bytes() for n in (3, 4)]
    assert weights[0] != weights[1]


def test_eleuthers_names_train_too(train, tmp_path):
    line = "--cross_layer 2 --coalesce_topk concat --topk_coalesced True --activation topk --skip_connection True"
    code, _, err = train(*line.split(), "--loss_fn", "kl-fvu")
    assert code == 0, err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["wiring"]["span"] == 2
    assert config["decoder"] == {"kind": "target-tied", "scale": False, "offset": False, "topk_coalesced": 6}
    assert config["skip"]["span"] == 1
    assert config["provenance"]["training"]["config"]["loss"] == {"kind": "kl", "weight": 1.0, "fvu_weight": 1.0}


def test_a_run_is_finetuned_from_another(train, tmp_path):
    train()
    code, _, err = train("--finetune", tmp_path / "run", out="tuned")
    assert code == 2
    assert "--d-transcoder is given, but --finetune keeps the run's own" in err


def test_runs_are_exported_and_imported(run, train, tmp_path):
    train()
    code, out, err = run("export", "circuit-tracer", tmp_path / "run", "--out", tmp_path / "theirs")
    assert code == 0, err
    code, out, err = run("import", "circuit-tracer", tmp_path / "theirs", "--out", tmp_path / "back")
    assert code == 0, err
    assert "3 layers of 16 features" in out
    code, out, err = run("export", "eleuther", tmp_path / "run", "--out", tmp_path / "more")
    check_refused((code, out, err), "topk", "JumpReLU")
    check_refused(run("import", "sae-lens", tmp_path, "--out", tmp_path / "x"), "'sae-lens'; choose one of eleuther")


def test_a_topk_run_goes_to_eleuther_and_comes_back_to_its_model(run, train, text, llama_folder, tmp_path):
    train("--sparsity", "topk", "--no-calibrate")
    assert run("export", "eleuther", tmp_path / "run", "--out", tmp_path / "theirs")[0] == 0
    back = ["import", "eleuther", tmp_path / "theirs", "--out", tmp_path / "back"]
    check_refused(run(*back, "--model", llama_folder), "--model and --data")
    assert run(*back, "--model", llama_folder, "--data", text)[0] == 0
    ours, again = (CrossLayerTranscoder.load(tmp_path / name) for name in ("run", "back"))
    x = torch.randn(9, 3, 32)
    torch.testing.assert_close(again(x), ours(x))
    torch.testing.assert_close(again.first_write, ours.first_write, rtol=0.2, atol=0.05)  # other chunks, other means


@pytest.fixture
def captured(run, llama_folder, text, tmp_path):
    """`crosslayer capture` of the tiny Llama."""

    def call(*options, out="store"):
        return run("capture", llama_folder, text, "--out", tmp_path / out, *options)

    return call


def test_capture_info_verify_train(run, captured, llama_folder, tmp_path):
    store = tmp_path / "store"
    code, out, err = captured("--store-dtype", "int8")
    assert code == 0, err
    assert "about" in err
    assert "are free" in err
    for asked in (out, run("store", "info", store)[1]):
        assert "reads off by" in asked
        assert "60 first positions" in asked
    assert "all 1 shards are as they were written" in run("store", "verify", store)[1]
    small = ["--tokens", 400, "--batch-tokens", 100, "--d-transcoder", 16, "--k", 6]
    code, out, err = run("train", llama_folder, "--store", store, "--out", tmp_path / "run", *small)
    assert code == 0, err
    assert "trained on" in out
    assert run("generate", tmp_path / "run", "--prompt", "a cat", "--max-new-tokens", 2)[0] == 0


def test_a_capture_says_how_to_train_from_it(captured, llama_folder, tmp_path):
    named = f"next: crosslayer train {llama_folder} --store {tmp_path / 'inner'} --read mlp_in --out RUN"
    assert named in captured("--prompts", 2, "--read", "mlp_in", out="inner")[1]
    assert "next:" not in captured("--prompts", 2, "--layers", 0, out="one")[1]


def test_a_damaged_store_is_found(run, captured, tmp_path):
    captured()
    shard = tmp_path / "store" / "shard-000000.safetensors"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    check_refused(run("store", "verify", tmp_path / "store"), "shard-000000.safetensors", "checksum")
    check_refused(run("store", "info", tmp_path), "no store")


def test_capture_options_that_cannot_work(captured, tmp_path):
    check_refused(captured("--tokens", 5, "--prompts", 5), "tokens is 5 and prompts is 5")
    check_refused(captured("--layers", "2-5"), "0 to 2")
    check_refused(captured("--layers", "all"), "'all'", "8-15")
    check_refused(captured("--shard-mib", 0), "shard_bytes")
    assert not (tmp_path / "store").exists()
    captured("--tokens", 50, "--layers", "1-2")
    check_refused(captured("--tokens", 50, "--resume"), "x_layers", "[1, 2]", "[0, 1, 2]")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["nothing to train on", "DATA or --store"]),
        (["text.txt", "--store"], ["text.txt", "not both"]),
        (["--read", "mlp_in", "--store"], ["'resid'", "'mlp_in'"]),
        (["--revision", "b", "--store"], ["''", "'b'"]),
        (["--loss", "kl", "--store"], ["loss is KL"]),
        (["--dry-run", "--store"], ["--dry-run", "DATA instead"]),
    ],
)
def test_training_from_a_store_that_cannot_work(run, captured, llama_folder, tmp_path, options, words):
    captured()
    where = [tmp_path / "store"] if options[-1:] == ["--store"] else []
    check_refused(run("train", llama_folder, *options, *where, "--out", tmp_path / "run"), *words)
    if where:
        other = run("train", "emoji-llava", "--store", *where, "--out", tmp_path / "run")
        check_refused(other, llama_folder, "MODEL is emoji-llava")
    assert not (tmp_path / "run").exists()


def test_layered_batches_become_a_store(run, llama_folder, tmp_path):
    model = load_model(llama_folder)
    batch = prepare(model.model, model.processor, [Example("a", "a cat and a dog"), Example("b", "a dog and a cat")])
    x, y = capture_all(model, batch)
    for layer in range(2):
        (tmp_path / "files" / f"L{layer}").mkdir(parents=True)
        torch.save(x[:, :, layer].clone(), tmp_path / "files" / f"L{layer}" / "batch_0_x.pt")
        torch.save(y[:, :, layer + 1].clone(), tmp_path / "files" / f"L{layer}" / "batch_0_y.pt")
    command = ["import", "layered-batches", tmp_path / "files", "--out", tmp_path / "store"]
    code, out, err = run(*command, "--model", llama_folder)
    assert code == 0, err
    assert "wirings with first_target 1, of any span" in out
    assert f"next: crosslayer train {llama_folder} --store {tmp_path / 'store'} --first-target 1 --out RUN" in out
    code, out, _ = run(*command, "--overwrite", "--store-dtype", "fp32")
    assert "none: " in out
    assert "lacks what layer 0's MLP writes" in out
    assert "next:" not in out
    check_refused(run(*command), "--overwrite")
    check_refused(
        run(*command, "--overwrite", "--model", llama_folder, "--target-offset", 0), "--target-offset 1 it is"
    )
    check_refused(
        run("import", "eleuther", tmp_path, "--out", tmp_path / "x", "--store-dtype", "fp32"),
        "eleuther has no use",
    )


def test_a_dry_run_prices_a_mesh_that_is_not_at_hand(train):
    mesh = ["--dry-run", "--ranks", 8, "--machine", "h100"]
    code, out, _ = train(*mesh, "--feature-ranks", 4, "--d-transcoder", 512)
    assert code == 0
    assert "8 = 2 data x 4 feature" in out
    assert "a step sends: gradients" in out
    assert "quickest that fits: --feature-ranks" in out
    check_refused(train(*mesh, "--feature-ranks", 3), "8 ranks cannot be split into groups of 3")
    check_refused(train("--ranks", 8), "--dry-run")
    check_refused(train("--dry-run", "--machine", "h100"), "without --ranks")
    check_refused(train("--dry-run", "--ranks", 8, "--machine", "abacus"), "abacus", "h100")
