"""The verb `hallucination contrast`: which features fire, and act, where a model hallucinates."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.distributed.joining import crew
from crosslayer.errors import UserError
from crosslayer.files import write_text
from crosslayer.hallucination.contrast import contrast as find_features
from crosslayer.hallucination.contrast_page import write_page
from crosslayer.hallucination.contrast_settings import ContrastSettings
from crosslayer.hallucination.feature_table import CONTRAST
from crosslayer.hallucination.responses import RESPONSES, Response, read_responses
from crosslayer.hallucination.rewriting import without
from crosslayer.model_options import AS_SAVED
from crosslayer.verbs.arguments import OtherModel, Overwrite, Run, RunLoading, load_run
from crosslayer.verbs.hallucination_tables import contrast_table

TABLE, PAGE = "contrast.csv", "contrast.html"


def contrast(
    run: Run,
    data: Annotated[
        Positional[Path | None],
        arg(metavar="RESPONSES", help="Labelled responses, or the folder they are in; those of --out by default."),
    ] = None,
    *,
    out: Annotated[Path, arg(help="Folder of the results: contrast.json, contrast.csv, contrast.html.")],
    settings: Annotated[ContrastSettings, arg(name="")] = ContrastSettings(),  # noqa: B008
    beside: Annotated[
        tuple[str, ...], arg(help="Other runs of the model, from other seeds for one, to find the features in.")
    ] = (),
    model: OtherModel = None,
    overwrite: Overwrite = False,
    loading: RunLoading = AS_SAVED,
) -> None:
    """Find the features that drive hallucination: tested, matched, and ranked by what they add to the decision.

    Hallucinated mentions are compared with true ones of the same object near the same position, on the images of the
    split `select` alone. The responses are those that `crosslayer hallucination score` writes.
    """
    path = _responses_file(data or out)
    here = crew()
    here.first(lambda: _check(out, overwrite))
    responses = read_responses(path)
    coder, loaded = load_run(run, model, loading)
    found = find_features(
        loaded, coder, responses, path.parent, settings, run=run,
        without=without if _of_the_bundled_world(responses) else None, crew=here,
        beside={name: CrossLayerTranscoder.load(name, offload=loading.offload) for name in beside},
    )  # fmt: skip
    here.dismiss()
    write_text(out / TABLE, found.to_csv())
    write_page(out / PAGE, found, path.parent)
    write_text(out / CONTRAST, found.to_json() + "\n")
    print(contrast_table(found))
    print(f"\n{out / PAGE} shows where they fire")


def _check(out: Path, overwrite: bool) -> None:
    if (out / CONTRAST).exists() and not overwrite:
        raise UserError(f"{out / CONTRAST}: already exists; choose another folder or add --overwrite")


def _responses_file(path: Path) -> Path:
    return path / RESPONSES if path.is_dir() or not path.suffix else path


def _of_the_bundled_world(responses: list[Response]) -> bool:
    """Whether the scenes are its own, so that a caption can be written anew without a mention."""
    return all(response.setting for response in responses)
