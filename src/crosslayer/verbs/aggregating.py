"""The verb that traces a data set: `graph --aggregate`."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from crosslayer.attribution.aggregate_figure import draw_aggregate, draw_contrast
from crosslayer.attribution.aggregate_summary import contrast_summary, summary
from crosslayer.attribution.many import GRAPHS, Case, Tracing, Workers
from crosslayer.attribution.many import aggregate as run_aggregation
from crosslayer.attribution.tally import Pruning
from crosslayer.attribution.targets import sums
from crosslayer.data.examples import Examples
from crosslayer.data.load import read_data
from crosslayer.data.reading import Reading
from crosslayer.distributed.joining import crew
from crosslayer.files import claim_folder, vacated
from crosslayer.model_options import AS_SAVED
from crosslayer.verbs.arguments import (
    Data,
    HowRead,
    OtherModel,
    Overwrite,
    Run,
    RunLoading,
    check_positive,
    load_run,
    print_skipped,
)


class Cases(Sequence[Case]):
    """What is asked of every example of a data set, each made when asked for."""

    def __init__(self, examples: Examples, token: int, targets: tuple[str, ...]):
        self.examples, self.token, self.targets = examples, token, targets

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index):
        return Case(example=self.examples[index], token=self.token, targets=self.targets, label=self.examples.name)


def aggregate(
    run: Run,
    data: Data,
    out: Annotated[Path, arg(help="Folder: aggregate.json, nodes.csv, edges.csv, aggregate.png, a file a graph.")],
    against: Annotated[str | None, arg(help="DATA to compare with; adds contrast.json, .csv and .png.")] = None,
    reading: HowRead = Reading(),  # noqa: B008
    limit: Annotated[int | None, arg(help="Examples at most, of each DATA; all by default.")] = None,
    share: Annotated[float, arg(help="List what the circuits of this share of the graphs have.")] = 0.2,
    workers: Annotated[int, arg(help="Processes, each with the model loaded anew and one thread.")] = 1,
    token: Annotated[int, arg(help="Which token of each response is explained, from 0 on.")] = 0,
    target: Annotated[
        tuple[str, ...],
        arg(help="""Tokens to explain, or differences, as in: '" yes" - " no"'; the likeliest ones by default."""),
    ] = (),
    probability: Annotated[float, arg(help="Of the likeliest tokens together, explained by default ...")] = 0.95,
    logits: Annotated[int, arg(help="... and how many of them at most.")] = 10,
    max_features: Annotated[int | None, arg(help="Features with a row, the most influential first; or all.")] = None,
    max_positions: Annotated[int | None, arg(help="Rows only at so many positions, the most influential.")] = None,
    pool_patches: Annotated[
        int | None, arg(help="Take image patches together in N x N cells: fewer nodes and rows, still exact.")
    ] = None,
    node_threshold: Annotated[float, arg(help="Share of influence that the nodes of a circuit carry.")] = 0.8,
    edge_threshold: Annotated[float, arg(help="Share of influence that the edges among them carry.")] = 0.98,
    seed: Annotated[int, arg(help="Of the bootstrap.")] = 0,
    model: OtherModel = None,
    overwrite: Overwrite = False,
    loading: RunLoading = AS_SAVED,
) -> None:
    """Average the graphs of a data set, and compare two; the same as `crosslayer graph --aggregate`.

    What is there already is taken up, so that the same command goes on where an earlier one ended.
    """
    check_positive(workers=workers, limit=limit or 1)
    asked = tuple(sums(target))
    coder, loaded = load_run(run, model, loading)
    pruning = Pruning(node_threshold=node_threshold, edge_threshold=edge_threshold)
    tracing = Tracing(
        probability=probability, at_most=logits, features=max_features, positions=max_positions,
        pool_patches=pool_patches, pruning=pruning,
    )  # fmt: skip
    team = Workers(n=workers, load=partial(load_run, run, model, loading)) if workers > 1 else None
    sets = {out: data} | ({} if against is None else {out / "against": against})
    read = {folder: read_data(name, reading, loaded, n=limit) for folder, name in sets.items()}
    found, here = [], crew()
    for folder, examples in read.items():
        with vacated(folder / GRAPHS) if here.leads else nullcontext():
            here.first(partial(claim_folder, folder / GRAPHS, True, ("*.json",) if overwrite else ()))
            found.append(
                run_aggregation(
                    loaded, coder, Cases(examples, token, asked), folder, run=run, tracing=tracing, share=share,
                    seed=seed, workers=team, skipped=examples.skipped, crew=here,
                )
            )  # fmt: skip
        if here.leads:
            found[-1].save(folder)
            draw_aggregate(found[-1], folder / "aggregate.png")
            print(f"{examples.name}: {summary(found[-1])}\n")
            print_skipped(examples)
    here.dismiss()
    if against is not None:
        changes = found[0].contrast(found[1])
        changes.save(out)
        draw_contrast(changes, out / "contrast.png")
        print(contrast_summary(changes))
