"""The model of a training on many ranks beside runs on 1, 2 and 4 local ones: bytes, memory and time of a step.

    python benchmarks/scaling.py [--keep]

Bytes are counted where they are sent. Times are of processes that share this machine's cores, joined by gloo over
loopback; the model is given what the machine does with one process, what its ranks share, and how quick an all-reduce
of theirs is.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from os import cpu_count, environ
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from machine import keep, machine

from crosslayer import JointTopK, TrainConfig, Wiring
from crosslayer.activations.record import Activations
from crosslayer.distributed.group import RankGroup, team_of
from crosslayer.distributed.mesh import Mesh, join
from crosslayer.planning import Rates, measure_rates
from crosslayer.report import table
from crosslayer.scaling import Layout, Machine, MeshPlan, Model, plan_mesh
from crosslayer.team import Places, share
from crosslayer.training.part import Part
from crosslayer.training.scales import estimate_scales
from crosslayer.training.trainer import Trainer

L, D, F, N, STEPS = 6, 128, 2048, 1024, 12
MESHES = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
"""Ranks in all, and feature ranks."""
ALONG = {
    "feature": ("reconstructions", "active features", "candidates"),
    "data": ("gradients",),
}
"""What the model has ranks send along each axis."""
NOTHING = Model(n_bytes=0, forward_flops=0.0, bytes_a_number=0)


def config() -> TrainConfig:
    """Settings of the training."""
    return TrainConfig(wiring=Wiring.full(L), sparsity=JointTopK(32, anneal_from=1), d_transcoder=F, batch_tokens=N)


def tokens() -> Activations:
    """A batch of random ones."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(N, L, D, generator=generator) for _ in range(2))
    n = torch.arange(N)
    return Activations(x, y, n < 0, n + 1, n, n)


@contextmanager
def counted(mesh: Mesh) -> Iterator[Counter]:
    """Bytes that this rank sends in rings, by axis."""
    sent, names = Counter(), {id(mesh.data): "data", id(mesh.feature): "feature"}
    shares = {
        "sum": lambda group, part: 2 * (group.size - 1) / group.size * part.nbytes,
        "gather": lambda group, part: (group.size - 1) * part.nbytes,
        "sum_back": lambda group, parts: (group.size - 1) / group.size * sum(part.nbytes for part in parts),
        "sum_gradients": lambda group, ps: 2 * (group.size - 1) / group.size * sum(p.nbytes for p in ps),
    }

    def watched(name: str) -> Any:
        def send(group: RankGroup, data: Any) -> Any:
            sent[names.get(id(group.ranks), "all")] += shares[name](group, data)
            return kept[name](group, data)

        return send

    kept = {name: getattr(RankGroup, name) for name in shares}
    for name in shares:
        setattr(RankGroup, name, watched(name))
    yield sent
    for name, method in kept.items():
        setattr(RankGroup, name, method)


def work(rank: int, n_ranks: int, n_feature: int, folder: str, answers: Any) -> None:
    """Train some steps; tell bytes and seconds of a step, and what an all-reduce takes."""
    torch.set_num_threads(1)
    environ.update(RANK=str(rank), WORLD_SIZE=str(n_ranks), LOCAL_RANK=str(rank))
    store = dist.FileStore(f"{folder}/store", n_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks)
    mesh, data = join(n_feature), tokens()
    team, settings = team_of(mesh), replace(config(), tokens=10**9)
    trainer = Trainer(settings, estimate_scales(data), team=team)
    own = share(team.tokens, N)
    batch = Part(data[own.start : own.stop], Places(torch.arange(own.start, own.stop), N))
    trainer.step(batch)
    with counted(mesh) as sent:
        seconds = [_timed(trainer.step, batch) for _ in range(STEPS)]
    n_bytes = sum(p.numel() * p.element_size() for p in trainer.coder.parameters())
    answers.put((rank, min(seconds), {name: n / STEPS for name, n in sent.items()}, n_bytes, *_links(n_ranks)))
    dist.destroy_process_group()


def _links(n_ranks: int) -> tuple[float, float]:
    """Bytes a second that a rank sends in an all-reduce, and the seconds of one that sends nothing."""
    if n_ranks == 1:
        return 1.0, 0.0
    small, large = torch.zeros(1), torch.zeros(2**21)
    latency = min(_timed(dist.all_reduce, small) for _ in range(20))
    seconds = min(_timed(dist.all_reduce, large) for _ in range(5))
    return 2 * (n_ranks - 1) / n_ranks * large.nbytes / seconds, latency


def _timed(function: Any, *args: Any) -> float:
    begun = time.perf_counter()
    function(*args)
    return time.perf_counter() - begun


def run(n_ranks: int, n_feature: int) -> list[tuple]:
    """What every rank told, by rank."""
    context = get_context("spawn")
    answers = context.Queue()
    with TemporaryDirectory() as folder:
        ranks = [context.Process(target=work, args=(r, n_ranks, n_feature, folder, answers)) for r in range(n_ranks)]
        for process in ranks:
            process.start()
        found = sorted(answers.get() for _ in ranks)
        for process in ranks:
            process.join()
    return found


def modelled(n_ranks: int, n_feature: int, bandwidth: float, latency: float) -> MeshPlan:
    """The plan for ranks that share the cores of this machine."""
    crowding = max(1.0, n_ranks / (cpu_count() or 1))
    rates = Rates(**{name: rate / crowding for name, rate in vars(measure_rates(torch.device("cpu"))).items()})
    here = Machine(rates, 1.0, None, n_ranks, bandwidth, bandwidth, latency)
    return plan_mesh(config(), D, Layout(n_ranks, n_feature), here, NOTHING)


def row(n_ranks: int, n_feature: int) -> list[str]:
    """A line of the table: measured / modelled."""
    found = run(n_ranks, n_feature)
    _, _, sent, n_bytes, bandwidth, latency = found[0]
    plan = modelled(n_ranks, n_feature, bandwidth, latency)
    told = {axis: sum(plan.sent[name] for name in names) for axis, names in ALONG.items()}
    return [
        f"{n_ranks // n_feature} x {n_feature}",
        f"{n_bytes / 2**20:.2f} / {plan.local.weights / 2**20:.2f}",
        *(f"{sent.get(axis, 0.0) / 2**20:.3f} / {told[axis] / 2**20:.3f}" for axis in told),
        f"{1000 * max(answer[1] for answer in found):.0f} / {1000 * plan.seconds:.0f}",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="write the result beside the others")
    keeps = parser.parse_args().keep
    torch.set_num_threads(1)
    header = ["data x feature", "weights MiB", *(f"{axis} axis MiB" for axis in ALONG), "step ms"]
    rows = table(header, [row(*mesh) for mesh in MESHES])
    about = f"measured / modelled, of a rank and step. L {L}, D {D}, F {F}, {N} tokens a step"
    text = f"{rows}\n\n{about}.\n"
    print(text)
    if keeps:
        title = "# A step on local ranks, measured and modelled"
        keep("scaling", "cpu", f"{title}\n\n{machine('cpu')}\n\n```\n{text}```\n")


if __name__ == "__main__":
    main()
