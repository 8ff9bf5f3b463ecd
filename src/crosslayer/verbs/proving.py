"""The verb `hallucination report`: all stages in one go, and what they prove on one page."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from crosslayer.coders.checkpoint import is_run
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.examples import Examples
from crosslayer.data.load import EMOJI_SCENES, load_data
from crosslayer.data.reading import DATA_KINDS
from crosslayer.errors import UserError
from crosslayer.files import read_json, write_json
from crosslayer.hallucination.circuits.find import CircuitSettings
from crosslayer.hallucination.circuits.record import CIRCUITS
from crosslayer.hallucination.contrast_settings import ContrastSettings
from crosslayer.hallucination.feature_table import CONTRAST
from crosslayer.hallucination.prove.findings import findings, goals
from crosslayer.hallucination.prove.page import write_page
from crosslayer.hallucination.prove.proof import Evidence, Proof, protocol, read_suppression
from crosslayer.hallucination.suppress.calibration import Calibration
from crosslayer.hallucination.suppress.everything import EDIT, SUPPRESS, Plan
from crosslayer.hallucination.suppress.objective import Weighing
from crosslayer.hallucination.suppress.protocol import Protocol, Trial
from crosslayer.memory import keep_freed_memory
from crosslayer.model_options import AS_SAVED, RunOptions
from crosslayer.models.load import LoadedModel, load_model
from crosslayer.processes import do_at_once
from crosslayer.replacement.edit_file import EditFile
from crosslayer.report import table
from crosslayer.training.config import TrainConfig
from crosslayer.training.state import STATE
from crosslayer.verbs.arguments import OtherModel, RunLoading, check_positive, load_run
from crosslayer.verbs.circuits import circuits
from crosslayer.verbs.contrasting import contrast
from crosslayer.verbs.scoring import BUNDLED_MODEL, SCORE, Truth, score
from crosslayer.verbs.suppressing import SCENES, suppress, trial_in
from crosslayer.wiring import Wiring
from crosslayer.workflow import train_at_once

REPORT, PAGE = "report.json", "report.html"
TOKENS = 1_000_000
CASES = 48
"""Hallucinated mentions whose circuits are traced: fewer than `circuits` traces by itself, as time is short."""
DOSES = (-1.0, -0.5, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


@dataclass(frozen=True)
class _Stage:
    """A step of the way, which ends in a file."""

    name: str
    file: Path
    holds: str
    make: Callable[[], None]


def report(
    run: Annotated[
        Positional[str | None],
        arg(metavar="RUN", help="Trained transcoder; without it, a CLT and a PLT of the bundled model are trained."),
    ] = None,
    data: Annotated[
        Positional[str | None],
        arg(metavar="DATA", help=f"What to score first where --out holds no responses. {DATA_KINDS}"),
    ] = None,
    *,
    out: Annotated[Path, arg(help="Folder of the results; what it holds already is taken up, and not made again.")],
    beside: Annotated[
        str | None, arg(help="Another run on the same model, a PLT for one, to compare at equal KL.")
    ] = None,
    tokens: Annotated[int, arg(help="Tokens that each transcoder is trained on, where RUN is not given.")] = TOKENS,
    scenes: Annotated[int, arg(help="Scenes of each kind to score, or rows of DATA.")] = SCENES,
    plan: Annotated[Plan, arg(name="")] = Plan(),  # noqa: B008
    weighing: Annotated[Weighing, arg(name="")] = Weighing(),  # noqa: B008
    calibration: Annotated[Calibration, arg(name="")] = Calibration(),  # noqa: B008
    control_images: Annotated[
        int, arg(help="Images of the test for the dose curves, and on which chance is measured.")
    ] = Protocol.control_images,
    doses: Annotated[tuple[float, ...], arg(help="Strengths of the dose curves; some below 0.")] = DOSES,
    workers: Annotated[
        int, arg(help="Processes that trace circuits, try methods, and prove the edit; training takes two at most.")
    ] = 1,
    seed: Annotated[int, arg(help="Seed of the trainings, the scenes, the splits and of all that is drawn.")] = 0,
    batch_prompts: Annotated[int, arg(help="Prompts in one pass.")] = Protocol.batch_prompts,
    model: OtherModel = None,
    loading: RunLoading = AS_SAVED,
) -> None:
    """Measure hallucination, find what causes it, suppress it, and prove it: one page for all of it.

    The stages are those of `score`, `contrast`, `circuits` and `suppress`, each in files of its own; after an
    interruption, or where a stage was run by itself with options of its own, the same command goes on from these files.
    """
    check_positive(
        tokens=tokens, scenes=scenes, control_images=control_images, batch_prompts=batch_prompts, workers=workers
    )
    if not min(doses, default=0.0) < 0:
        raise UserError(f"doses are {doses}; at least one below 0 is wanted, which must raise hallucination")
    if run is None:
        run, beside = _trained(out, data, tokens, seed, workers)
    coder, loaded = load_run(run, model, loading)
    other = _beside(beside, loading)
    stages = (
        _Stage(
            "score", out / SCORE, "how much is hallucinated",
            lambda: score(
                loaded.id, data, out=out, truth=Truth(questions=1), limit=scenes, batch_prompts=batch_prompts,
                seed=seed, resume=True, loading=loading,
            ),
        ),
        _Stage(
            "contrast", out / CONTRAST, "which features act where",
            lambda: contrast(
                str(run), None, out=out, settings=ContrastSettings(seed=seed, split_seed=seed), model=model,
                overwrite=True, loading=loading,
            ),
        ),
        _Stage(
            "circuits", out / CIRCUITS, "through which paths",
            lambda: circuits(
                str(run), None, out=out, settings=CircuitSettings(cases=CASES, seed=seed, split_seed=seed),
                workers=workers, model=model, loading=loading,
            ),
        ),
        _Stage(
            "suppress", out / SUPPRESS, "edits by every method",
            lambda: suppress(
                str(run), data, out=out, beside=beside, circuit=_circuit(out), plan=plan, weighing=weighing,
                calibration=calibration, control_images=control_images, seed=seed, batch_prompts=batch_prompts,
                workers=workers, model=model, loading=loading,
            ),
        ),
    )  # fmt: skip
    for number, stage in enumerate(stages, 1):
        _run(number, len(stages) + 1, stage)
    print(f"[{len(stages) + 1}/{len(stages) + 1}] prove: {out / REPORT}", flush=True)
    evidence = _evidence(loaded, coder, other, out, doses)
    if workers > 1:
        load = partial(_loaded, run, model, beside, loading, out, doses)
        do_at_once(workers, load, [tuple(evidence.pieces)], desc="prove")
    proof = evidence.proof()
    holds = {stage.file.name: stage.holds for stage in stages} | {EDIT: "the edit, for crosslayer generate --edit"}
    holds |= {"contrast.html": "where these features fire", "circuits.html": "these paths, drawn"}
    write_json(out / REPORT, {**proof.to_dict(), **_said(proof)})
    write_page(out / PAGE, proof, out, {REPORT: "all figures of this page", **holds})
    print(_summary(proof))
    print(f"\nreport: {out / PAGE}")


def _trained(out: Path, data: str | None, tokens: int, seed: int, workers: int) -> tuple[str, str]:
    """A CLT and a PLT of the bundled model on the bundled scenes, finished or made now, in `out`."""
    if data not in (None, EMOJI_SCENES):
        raise UserError(f"{data}: whose model is to answer? name a RUN before DATA; see crosslayer train")
    keep_freed_memory()
    model, scenes = _stream(seed)
    wirings = {"clt": Wiring.full(model.n_layers), "plt": Wiring.per_layer(model.n_layers)}
    configs = {out / name: TrainConfig(wiring=wiring, tokens=tokens, seed=seed) for name, wiring in wirings.items()}
    missing = {run: config for run, config in configs.items() if not is_run(str(run)) or (run / STATE).exists()}
    if missing:
        print(f"train {' and '.join(map(str, missing))} on {tokens:,} tokens", flush=True)
        train_at_once(model, scenes, missing, load=partial(_stream, seed) if workers > 1 else None)
    return str(out / "clt"), str(out / "plt")


def _stream(seed: int) -> tuple[LoadedModel, Examples]:
    """What the transcoders of the bundled model are trained on."""
    return load_model(BUNDLED_MODEL), load_data(EMOJI_SCENES, seed=seed)


def _run(number: int, n: int, stage: _Stage) -> None:
    if stage.file.exists():
        print(f"[{number}/{n}] {stage.name}: taken from {stage.file}", flush=True)
        return
    print(f"[{number}/{n}] {stage.name}", flush=True)
    stage.make()
    print(flush=True)


def _circuit(out: Path) -> Path | None:
    """The file of the circuits' features, where there are some."""
    return out / CIRCUITS if read_json(out / CIRCUITS)["features"] else None


def _trial(model: LoadedModel, coder: CrossLayerTranscoder, out: Path) -> Trial:
    """That of the suppression in a folder of results.

    Raises:
        UserError: when it is of another model or run.
    """
    try:
        EditFile.load(out / EDIT).check(model, coder)
    except UserError as error:
        raise UserError(f"{out / EDIT}: {error}; choose another --out, or the RUN that it is for") from None
    return trial_in(out, model, protocol(read_suppression(out)))


def _beside(run: str | None, loading: RunOptions) -> CrossLayerTranscoder | None:
    return None if run is None else CrossLayerTranscoder.load(run, offload=loading.offload).requires_grad_(False)


def _evidence(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    beside: CrossLayerTranscoder | None,
    out: Path,
    doses: tuple[float, ...],
) -> Evidence:
    trial = _trial(model, coder, out)
    return Evidence(trial=trial, coder=coder.requires_grad_(False), beside=beside, strengths=doses)


def _loaded(
    run: str, model: str | None, beside: str | None, loading: RunOptions, out: Path, doses: tuple[float, ...]
) -> Evidence:
    """The same in a process of its own."""
    coder, loaded = load_run(run, model, loading)
    return _evidence(loaded, coder, _beside(beside, loading), out, doses)


def _said(proof: Proof) -> dict[str, list[dict[str, object]]]:
    return {"goals": [vars(goal) for goal in goals(proof)], "findings": [vars(found) for found in findings(proof)]}


def _summary(proof: Proof) -> str:
    """Goals and findings for a terminal."""
    parts = []
    if goals(proof):
        rows = [[g.goal, "met" if g.met else "NOT MET", g.figures] for g in goals(proof)]
        parts.append(table(["goal", "", "measured"], rows))
    lines = [f"{'+' if f.supported else '-'} {f.claim}\n    {f.evidence}" for f in findings(proof)]
    return "\n\n".join([*parts, "supported (+), not supported (-)", "\n".join(lines)])
