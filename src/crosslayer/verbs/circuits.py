"""The verb `hallucination circuits`: which paths make a model hallucinate, and can it be told beforehand."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from crosslayer.attribution.many import GRAPHS, Workers
from crosslayer.distributed.joining import crew
from crosslayer.errors import UserError
from crosslayer.files import claim_folder, vacated, write_text
from crosslayer.hallucination.circuits.find import CircuitSettings, find_circuits
from crosslayer.hallucination.circuits.page import write_page
from crosslayer.hallucination.circuits.record import CIRCUITS
from crosslayer.hallucination.responses import RESPONSES, read_responses
from crosslayer.model_options import AS_SAVED
from crosslayer.verbs.arguments import OtherModel, Overwrite, Run, RunLoading, check_positive, load_run
from crosslayer.verbs.circuits_table import circuits_table

PAGE, FOLDER = "circuits.html", "circuits"


def circuits(
    run: Run,
    data: Annotated[
        Positional[Path | None],
        arg(metavar="RESPONSES", help="Labelled responses, or the folder they are in; those of --out by default."),
    ] = None,
    *,
    out: Annotated[Path, arg(help="Folder of the results: circuits.json, circuits.html, circuits/, a file a graph.")],
    settings: Annotated[CircuitSettings, arg(name="")] = CircuitSettings(),  # noqa: B008
    workers: Annotated[int, arg(help="Processes, each with the model loaded anew and one thread.")] = 1,
    model: OtherModel = None,
    overwrite: Overwrite = False,
    loading: RunLoading = AS_SAVED,
) -> None:
    """Find the circuits behind hallucination: aggregated graphs of hallucinated against true answers.

    Only the images of the split `select` are looked at. The responses are those that `crosslayer hallucination score`
    writes. Graphs that are there already are taken up, so that the same command goes on where an earlier one ended.
    """
    check_positive(workers=workers)
    path = _responses_file(data or out)
    if (out / CIRCUITS).exists() and not overwrite:
        raise UserError(f"{out / CIRCUITS}: already exists; choose another folder or add --overwrite")
    responses = read_responses(path)
    coder, loaded = load_run(run, model, loading)
    here = crew()
    team = Workers(n=workers, load=partial(load_run, run, model, loading)) if workers > 1 else None
    with vacated(out / FOLDER / GRAPHS) if here.leads else nullcontext():
        here.first(lambda: claim_folder(out / FOLDER / GRAPHS, True, ("*.json",) if overwrite else ()))
        found = find_circuits(
            loaded, coder, responses, path.parent, out / FOLDER, settings, run=run, workers=team, crew=here
        )
    here.dismiss()
    write_page(out / PAGE, found, len(loaded.sites.layers))
    write_text(out / CIRCUITS, found.to_json() + "\n")
    print(circuits_table(found))
    print(f"\n{out / PAGE} shows them")


def _responses_file(path: Path) -> Path:
    return path / RESPONSES if path.is_dir() or not path.suffix else path
