"""Graphs of many examples: a small file each, so that what ends early goes on where it was."""

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from crosslayer.attribution.aggregate import Aggregate, check_share
from crosslayer.attribution.attribute import Budget, attribute
from crosslayer.attribution.graph import AttributionGraph
from crosslayer.attribution.tally import Pruning, Tally, read_tally, tally, write_tally
from crosslayer.attribution.targets import check_likeliest
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.examples import FEW, Example, digest
from crosslayer.data.skipped import SKIPPED, Skipped
from crosslayer.distributed.crew import ALONE, Crew
from crosslayer.errors import UserError
from crosslayer.files import appeared
from crosslayer.models.load import LoadedModel
from crosslayer.processes import working

GRAPHS = "graphs"
"""Folder, inside that of the output, with a file for each graph."""
AHEAD = 8
"""Examples that are handed to each worker at once."""
BEGINNING = 4096
"""Numbers of each tensor that tell two transcoders apart."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One example, and what is to be explained of it."""

    example: Example
    token: int = 0
    """Which token of its response, from 0 on."""
    targets: tuple[str, ...] = ()
    """Tokens, `"a" - "b"` for a difference; the likeliest ones when left out."""
    label: str = ""
    """The set that it belongs to."""
    patches: Mapping[int, str] = field(default_factory=dict)
    """Names for some of the image's patches, by their number in reading order: places of their own in the aggregate."""


@dataclass(frozen=True, kw_only=True)
class Tracing:
    """How every example is traced."""

    probability: float = 0.95
    """Of the likeliest tokens together, where a case names no targets."""
    at_most: int = 10
    """Likeliest tokens at most."""
    features: int | None = None
    """Features with a row of their own, the most influential first; all by default."""
    positions: int | None = None
    """Rows only at so many positions of each prompt, the most influential; a cell of patches counts as one."""
    pool_patches: int | None = None
    """Image patches are taken together in a grid of so many cells a side; each alone by default."""
    pruning: Pruning = field(default_factory=Pruning)
    """What counts as a graph's circuit."""

    def __post_init__(self):
        if self.pool_patches is not None and self.pool_patches < 1:
            raise UserError(f"pool_patches is {self.pool_patches}; choose at least 1, or leave it out")
        Budget(features=self.features, positions=self.positions)  # refuses less than 1
        check_likeliest(self.probability, self.at_most)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Processes that share the work, each with the model loaded anew and one thread."""

    n: int
    load: Callable[[], tuple[CrossLayerTranscoder, LoadedModel]]
    """A function at the top of a module, or a `functools.partial` of one."""

    def __post_init__(self):
        if self.n < 1:
            raise UserError(f"workers is {self.n}; choose at least 1")


def aggregate(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    cases: Sequence[Case],
    out: str | Path,
    *,
    run: str = "",
    tracing: Tracing | None = None,
    share: float = 0.2,
    seed: int = 0,
    workers: Workers | None = None,
    skipped: Skipped | None = None,
    crew: Crew = ALONE,
) -> Aggregate:
    """Trace every case, and put the graphs together.

    The graphs go to a folder of `out`, a file each; those that are there already are taken up. Processes with one
    thread each give the same figures however many there are; with several threads sums may round otherwise.

    Args:
        model: the language model.
        coder: its transcoder.
        cases: examples with what is to be explained of each.
        out: a folder for the graphs.
        run: where the transcoder comes from, for the record.
        tracing: how; the same for all.
        share: nodes and edges are listed that the circuits of this share of the graphs have.
        seed: of the bootstrap.
        workers: processes to share the work; this one alone when left out.
        skipped: takes note of cases that cannot be traced, and lists them in `out` once there is a graph; without it
            the first one is an error.
        crew: the processes that torchrun started, instead of `workers`; all of them have the result.

    Raises:
        UserError: when a graph is there that was made with another run, other settings or of another example, naming
            both; when too many cases, or all, cannot be traced.
    """
    check_share(share)
    tracer = _Tracer(model, coder, run, tracing or Tracing())
    files = [Path(out) / GRAPHS / f"{number:06d}.json" for number in range(len(cases))]
    crew.agree(lambda: {**tracer.about, "examples": len(cases), "digest": _digest_of(cases)})
    missing = {i: files[i] for i in crew.first(lambda: [i for i, file in enumerate(files) if not file.exists()])}
    found = {i: tracer.read(file, cases[i]) for i, file in enumerate(files) if i not in missing}
    if workers is None:
        outcomes = _alone(tracer, cases, missing, crew)
    elif crew.alone:
        outcomes = _shared(workers, tracer, cases, missing)
    else:
        raise UserError(f"workers is {workers.n} though torchrun started {crew.size} processes; leave it out")
    listed, reasons = skipped if crew.leads else None, []
    if found:
        _list(listed, Path(out))
    bar = tqdm(total=len(files), initial=len(found), unit="graph", desc="aggregate", disable=None, leave=False)
    with closing(outcomes), bar:
        try:
            for i, (id, reason) in zip(missing, outcomes, strict=True):
                if reason:
                    reasons.append(reason)
                else:
                    found[i] = tracer.read(appeared(files[i]), cases[i])
                    _list(listed, Path(out))
                if crew.leads:
                    _note(skipped, id, reason, len(cases))
                bar.update()
        except KeyboardInterrupt:
            done = f"{sum(file.exists() for file in files):,} of {len(files):,} graphs"
            raise KeyboardInterrupt(f"stopped after {done}; the same command goes on from there") from None
    if reasons and not found:
        raise UserError(f"none of {len(cases)} examples can be traced; the first: {reasons[0]}")
    return Aggregate(tallies=tuple(found[i] for i in sorted(found)), about=tracer.about, share=share, seed=seed)


class _Tracer:
    """Traces cases, and writes and reads their files."""

    def __init__(self, model: LoadedModel, coder: CrossLayerTranscoder, run: str, tracing: Tracing):
        self.model, self.coder, self.run, self.tracing = model, coder, run, tracing
        told = f"{Path(run).name} {_digest(coder)}".strip()
        self.about = {"run": told, "model": model.id, "revision": model.revision, **asdict(tracing)}

    def write(self, file: Path, case: Case) -> tuple[str, str]:
        """Trace a case; its name, and why it cannot be, where that is so."""
        try:
            graph = self._graph(case)
        except UserError as error:
            return case.example.id, str(error)
        settings = {"token": case.token, "patches": case.patches, "pruning": self.tracing.pruning}
        write_tally(file, tally(graph, case.example.id, case.label, **settings), self._made_of(case))
        return case.example.id, ""

    def read(self, file: Path, case: Case) -> Tally:
        """What is in the file, if it is this case's and made like this."""
        return read_tally(file, self._made_of(case))

    def _graph(self, case: Case) -> AttributionGraph:
        example, tracing = case.example, self.tracing
        if example.tokens is not None:
            raise UserError(f"{example.id}: is mere tokens; a prompt in words is wanted")
        return attribute(
            self.model, self.coder, example.prompt, example.picture(), response=example.response,
            history=example.history, form=example.form, token=case.token, targets=case.targets,
            probability=tracing.probability, at_most=tracing.at_most, pool_patches=tracing.pool_patches,
            budget=Budget(features=tracing.features, positions=tracing.positions),
        )  # fmt: skip

    def _made_of(self, case: Case) -> dict[str, Any]:
        patches = {str(number): name for number, name in case.patches.items()}
        asked = {"token": case.token, "targets": list(case.targets), "label": case.label, "patches": patches}
        return {**self.about, "example": case.example.id, "content": _content(case.example), **asked}


def _digest(coder: CrossLayerTranscoder) -> str:
    """What tells two transcoders of one name apart."""
    digest = hashlib.sha256()
    for name, tensor in coder.state_dict().items():
        digest.update(name.encode() + tensor.flatten()[:BEGINNING].float().numpy(force=True).tobytes())
    return digest.hexdigest()[:12]


def _digest_of(cases: Sequence[Case]) -> str:
    """What tells most sequences of cases apart."""
    return digest([cases[i].example for i in range(0, len(cases), max(1, len(cases) // FEW))])


def _content(example: Example) -> str:
    """What tells two examples of one name apart."""
    image = example.image
    if isinstance(image, Path):
        image = image.read_bytes() if image.is_file() else b""
    pixels = image.tobytes() if isinstance(image, Image.Image) else image or b""
    words = repr((example.prompt, example.response, example.history, example.form))
    return hashlib.sha256(words.encode() + pixels).hexdigest()[:12]


def _alone(
    tracer: _Tracer, cases: Sequence[Case], missing: Mapping[int, Path], crew: Crew
) -> Generator[tuple[str, str]]:
    """Of each example, its name and why it cannot be traced, where that is so."""
    numbers = list(missing)
    for outcome in crew.map(lambda i: {"is": tracer.write(missing[numbers[i]], cases[numbers[i]])}, len(numbers)):
        id, reason = outcome["is"]
        yield id, reason


def _shared(
    workers: Workers, tracer: _Tracer, cases: Sequence[Case], missing: Mapping[int, Path]
) -> Generator[tuple[str, str]]:
    """The same by several processes, in the same order."""
    jobs = iter(missing.items())
    with working(workers.n, _begin, workers.load, tracer.run, tracer.tracing) as pool:
        while some := list(islice(jobs, AHEAD * workers.n)):
            yield from pool.map(_work, [(file, cases[i]) for i, file in some])


_here: list[_Tracer] = []
"""Of a worker: its tracer."""


def _begin(load: Callable, run: str, tracing: Tracing) -> None:
    coder, model = load()
    _here.append(_Tracer(model, coder, run, tracing))


def _work(job: tuple[Path, Case]) -> tuple[str, str]:
    return _here[0].write(*job)


def _list(skipped: Skipped | None, out: Path) -> None:
    """List what is noted beside the graphs, unless it is listed already."""
    if skipped is not None and skipped.file is None:
        skipped.list_in(out / SKIPPED)


def _note(skipped: Skipped | None, id: str, reason: str, of: int) -> None:
    if skipped is None and reason:
        raise UserError(f"{id}: {reason}")
    if skipped is not None:
        if reason:
            skipped.note(id, reason)
        skipped.look(1, of, "the data set")
