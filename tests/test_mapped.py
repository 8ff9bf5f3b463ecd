"""Runs stay on disk until they are used: nothing is held that was not touched, and no bit of a result changes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._pytree import tree_map_only

from crosslayer import CrossLayerTranscoder, ReplacementModel, TopK, UserError, Wiring, attribute, mapped
from crosslayer.coders.decoders import Full, LowRank, SourceAndTargetTied, SourceTied, TargetTied
from crosslayer.mapped import give_back, map_tensors
from crosslayer.models.prompts import prepare
from crosslayer.replacement.actions import Ablate
from crosslayer.replacement.editing import edited
from crosslayer.replacement.interventions import Intervention
from making import finished_coder, text_examples

WIRING = Wiring.full(3)
BANKS = [
    Full(),
    Full(scale=True, offset=True),
    SourceTied(),
    TargetTied(scale=True, offset=True, topk_coalesced=3),
    SourceAndTargetTied(),
    LowRank(rank=2, offset=True),
]


class Far(torch.Tensor):
    """Weights as on another device: only rows, whole parts and single numbers of them can be brought."""

    brought: list[int] = []  # noqa: RUF012
    VIEWS = (
        "flatten", "split", "detach", "unbind", "__getitem__", "requires_grad_", "__len__", "dim", "size", "numel",
        "is_contiguous", "data_ptr",
    )  # fmt: skip

    @property
    def device(self):
        return torch.device("cpu:0")  # which differs from that of any other tensor here

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = func.__name__
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
            if name in ("index_select", "to"):
                found = found.as_subclass(torch.Tensor)
                cls.brought.append(found.numel())
                return found
        assert name in (*cls.VIEWS, "__get__"), f"{name} of weights that lie elsewhere"
        return tree_map_only(torch.Tensor, lambda tensor: tensor.as_subclass(Far), found)


def coder_with(bank, *, F=24) -> CrossLayerTranscoder:
    torch.manual_seed(3)
    coder = CrossLayerTranscoder(WIRING, 32, F, TopK(4), bank, skip=Wiring.per_layer(3))
    for parameter in coder.parameters():
        parameter.data = torch.randn_like(parameter) / 8
    coder.first_write.normal_()
    if getattr(bank, "topk_coalesced", None) is None:
        coder.with_thresholds(torch.rand(3, F) / 2 + 0.4)
    return coder.requires_grad_(False)


def far(coder: CrossLayerTranscoder) -> CrossLayerTranscoder:
    banks = [home for home in coder.decoder.children() if isinstance(home, torch.nn.ParameterList)]
    for home in (coder.W_enc, coder.W_skip, *banks):
        for i, parameter in enumerate(home):
            home[i] = torch.nn.Parameter(parameter.detach().as_subclass(Far), requires_grad=False)
    return coder


def logits(model, coder) -> torch.Tensor:
    return ReplacementModel(model, coder).logits(prepare(model.model, model.processor, text_examples(3)))


@pytest.mark.parametrize("bank", BANKS, ids=repr)
def test_weights_elsewhere_give_the_same_to_the_last_bit(llama, tmp_path, bank):
    coder_with(bank).save(tmp_path)
    coder = CrossLayerTranscoder.load(tmp_path).requires_grad_(False)
    other = far(CrossLayerTranscoder.load(tmp_path, offload=True))
    assert torch.equal(logits(llama, other), logits(llama, coder))


def test_edits_of_weights_elsewhere_give_the_same_to_the_last_bit(llama, tmp_path):
    coder_with(Full(scale=True, offset=True)).save(tmp_path)
    edits = [Intervention(layer=0, feature=5, action=Ablate())]
    batch, found = prepare(llama.model, llama.processor, text_examples(2)), []
    for coder in (CrossLayerTranscoder.load(tmp_path), far(CrossLayerTranscoder.load(tmp_path, offload=True))):
        with torch.no_grad(), edited(llama, coder, edits, batch=batch):
            found.append(llama.model(**batch.inputs).logits)
    assert torch.equal(*found)


def test_a_graph_of_weights_elsewhere_has_the_same_edges(llama, tmp_path):
    coder_with(Full(), F=512).save(tmp_path)
    coder = CrossLayerTranscoder.load(tmp_path).requires_grad_(False)
    other = far(CrossLayerTranscoder.load(tmp_path, offload=True))
    ours, theirs = (attribute(llama, one, "a cat and a dog", form="text") for one in (coder, other))
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.nodes == theirs.nodes


def test_only_rows_of_active_features_are_brought_from_a_decoder(llama, tmp_path):
    coder = coder_with(Full(), F=512)
    coder.with_thresholds(torch.full((3, 512), 5.0))
    coder.save(tmp_path)
    other = CrossLayerTranscoder.load(tmp_path, offload=True)
    for i, W in enumerate(other.W_dec):
        other.W_dec[i] = torch.nn.Parameter(W.detach().as_subclass(Far), requires_grad=False)
    Far.brought.clear()
    assert torch.equal(logits(llama, other), logits(llama, CrossLayerTranscoder.load(tmp_path)))
    assert len(Far.brought) == len(other.W_dec)
    assert 0 < sum(Far.brought) < 0.5 * sum(W.numel() for W in other.W_dec)


CAPPED = """
import resource, sys
from pathlib import Path
import torch
from crosslayer import CrossLayerTranscoder
from crosslayer.coders.checkpoint import run_folder
torch.set_num_threads(1)
folder = Path(sys.argv[1])
size = (folder / "model.safetensors").stat().st_size
warm = CrossLayerTranscoder.load(sys.argv[2])
x = torch.randn(8, 4, warm.d_model, generator=torch.Generator().manual_seed(0))
warm(x)
status = Path("/proc/self/status").read_text().splitlines()
data = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
limit = data + size + size // 4
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
coder = CrossLayerTranscoder.load(folder).requires_grad_(False)
print(coder(x).sum().item())
if sys.argv[3] == "copy":
    torch.cat([W.flatten() for W in coder.parameters()])
"""


def capped(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", CAPPED, *map(str, args)], capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA")
def test_a_run_is_used_where_it_may_not_be_held(tmp_path):
    coder = finished_coder(Wiring.full(4), D=256, F=4096)  # 58 MB
    coder.with_thresholds(torch.full((4, 4096), 3.5))
    coder.save(tmp_path / "run")
    finished_coder(Wiring.full(4), D=256, F=8).save(tmp_path / "small")
    x = torch.randn(8, 4, 256, generator=torch.Generator().manual_seed(0))
    used = capped(tmp_path / "run", tmp_path / "small", "use")
    assert used.returncode == 0, used.stderr
    assert float(used.stdout) == coder(x).sum().item()
    assert "can't allocate memory" in capped(tmp_path / "run", tmp_path / "small", "copy").stderr


def test_writing_to_a_map_leaves_the_file_alone(tmp_path):
    save_file({"a": torch.arange(6.0).view(2, 3), "empty": torch.zeros(0, 3)}, tmp_path / "t.safetensors")
    before, tensors = (tmp_path / "t.safetensors").read_bytes(), map_tensors(tmp_path / "t.safetensors")
    tensors["a"].mul_(2)
    assert tensors["a"].tolist() == [[0, 2, 4], [6, 8, 10]]
    assert tensors["empty"].shape == (0, 3)
    assert (tmp_path / "t.safetensors").read_bytes() == before


def in_memory(kind: str) -> int:
    """Bytes of pages of files (RssFile), or of others (RssAnon), that this process has in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells what a page belongs to")
def test_what_is_given_back_is_read_again_and_what_was_written_stays(tmp_path):
    torch.manual_seed(0)
    wanted = {name: torch.randn(2**22) for name in ("read", "written", "through_numpy")}  # 16 MiB each
    save_file(wanted, tmp_path / "t.safetensors")
    tensors = map_tensors(tmp_path / "t.safetensors") | {"no_map": torch.randn(2**22)}
    wanted["no_map"] = tensors["no_map"].clone()
    tensors["written"][7] = wanted["written"][7] = 5.0
    tensors["through_numpy"].data.numpy()[-1] = wanted["through_numpy"][-1] = 6.0
    assert all(torch.equal(tensors[name], tensor) for name, tensor in wanted.items())
    before = in_memory("RssFile"), in_memory("RssAnon")
    give_back(tensors.values())
    freed = before[0] - in_memory("RssFile")
    assert 15 * 2**20 < freed < 20 * 2**20  # what was only read
    assert before[1] - in_memory("RssAnon") < 2**20
    assert all(torch.equal(tensors[name], tensor) for name, tensor in wanted.items())


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells what a page belongs to")
@pytest.mark.parametrize("pagemap", ["/nowhere", "/dev/zero"])
def test_nothing_is_given_back_where_the_system_does_not_tell(tmp_path, monkeypatch, pagemap):
    save_file({"a": torch.ones(2**22)}, tmp_path / "t.safetensors")
    tensors = map_tensors(tmp_path / "t.safetensors")
    tensors["a"].mul_(2)
    monkeypatch.setattr(mapped, "PAGEMAP", Path(pagemap))
    give_back(tensors.values())
    assert (tensors["a"] == 2).all()


def test_numbers_of_another_kind_are_named(tmp_path):
    save_file({"a": torch.arange(6)}, tmp_path / "t.safetensors")
    with pytest.raises(UserError, match=r"t.safetensors: a is of type I64; F64, F32, F16, BF16 are read"):
        map_tensors(tmp_path / "t.safetensors")
