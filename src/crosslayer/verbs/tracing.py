"""The verb that traces a prompt: graph."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from crosslayer.attribution.attribute import Budget, attribute
from crosslayer.attribution.faithfulness import check_measurable
from crosslayer.attribution.figure import write_figure
from crosslayer.attribution.graph import AttributionGraph, edges_path
from crosslayer.attribution.summary import summary
from crosslayer.attribution.targets import is_feature, sums
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.examples import Example
from crosslayer.errors import UserError
from crosslayer.formats.circuit_tracer_graph import write_circuit_tracer_graph
from crosslayer.memory import keep_freed_memory
from crosslayer.model_options import AS_SAVED
from crosslayer.verbs.arguments import OtherModel, Overwrite, Plain, Run, RunLoading, load_run
from crosslayer.verbs.checking import check_paths, checked_on


def graph(
    run: Run,
    prompt: Annotated[str, arg(help="What was said to the model; <image> marks where the image goes, else first.")],
    out: Annotated[Path, arg(help="GRAPH.json; the edges go to GRAPH.safetensors, a page to look at to GRAPH.html.")],
    image: Annotated[Path | None, arg(help="Picture that it was shown.")] = None,
    response: Annotated[str | None, arg(help="The answer, to explain a token in its middle.")] = None,
    token: Annotated[tuple[int, ...], arg(help="Which tokens of the answer are explained, from 0 on.")] = (0,),
    plain: Plain = False,
    target: Annotated[
        tuple[str, ...],
        arg(
            help="""Tokens to explain, differences (" yes" - " no"), weighted sums ('" yes" - 0.5 " no"'), or features
        ("feature 5/123 @ 17": layer, number, position, negative ones from the end); the likeliest by default."""
        ),
    ] = (),
    probability: Annotated[float, arg(help="Of the likeliest tokens together, explained by default ...")] = 0.95,
    logits: Annotated[int, arg(help="... and how many of them at most.")] = 10,
    max_features: Annotated[int | None, arg(help="Features with a row, the most influential first; or all.")] = None,
    max_positions: Annotated[int | None, arg(help="Rows only at so many positions, the most influential.")] = None,
    max_seconds: Annotated[float | None, arg(help="Start no further rows after this time.")] = None,
    pool_patches: Annotated[
        int | None, arg(help="Take image patches together in N x N cells: fewer nodes and rows, still exact.")
    ] = None,
    node_threshold: Annotated[float, arg(help="Share of influence that the features shown carry.")] = 0.8,
    edge_threshold: Annotated[float, arg(help="Share of influence that the edges shown carry.")] = 0.98,
    check: Annotated[
        bool, arg(help="Ablate the most influential features and compare: GRAPH.check.json, GRAPH.check.png.")
    ] = False,
    beside: Annotated[str | None, arg(help="With --check: another run, a PLT for one, to check beside.")] = None,
    circuit_tracer: Annotated[Path | None, arg(help="Folder for the pruned graph in circuit-tracer's form.")] = None,
    model: OtherModel = None,
    overwrite: Overwrite = False,
    loading: RunLoading = AS_SAVED,
) -> None:
    """Trace which image patches and words led to a token, through which features: exact, and shown as a page.

    With --aggregate DATA instead of --prompt, of a whole data set: `crosslayer aggregate --help`.
    """
    if out.suffix != ".json":
        raise UserError(f"{out}: a graph's file name ends in .json")
    page, target = out.with_suffix(".html"), tuple(sums(target))
    if beside is not None and not check:
        raise UserError(f"--beside {beside} is given without --check; add it")
    if check and any(map(is_feature, target)):
        raise UserError("--check measures effects on logits, and --target names a feature; leave one out")
    viewed = () if circuit_tracer is None else (circuit_tracer / out.name,)
    if out.resolve() in [path.resolve() for path in viewed]:
        raise UserError(f"--circuit-tracer {circuit_tracer}: {out} is there; choose another folder")
    _check_free((out, edges_path(out), page, *(check_paths(out) if check else ()), *viewed), overwrite)
    coder, loaded = load_run(run, model, loading)
    runs = [(run, coder)]
    if beside is not None:
        runs.append((beside, CrossLayerTranscoder.load(beside, offload=loading.offload)))
    form = "text" if plain else "chat"
    settings: dict[str, Any] = {
        "response": response, "token": token, "form": form, "targets": target, "probability": probability,
        "at_most": logits, "pool_patches": pool_patches,
        "budget": Budget(features=max_features, seconds=max_seconds, positions=max_positions),
    }  # fmt: skip
    keep_freed_memory()
    graphs = [(each, attribute(loaded, each, prompt, image, **settings, run=name)) for name, each in runs]
    found = graphs[0][1]
    pruned = found.prune(node_threshold, edge_threshold)
    for _, each in graphs if check else ():
        check_measurable(each)
    if circuit_tracer is not None:
        write_circuit_tracer_graph(pruned, circuit_tracer, slug=out.stem, node_threshold=node_threshold)
    found.save(out)
    write_figure(pruned, page)
    print(f"{_whole(found)}\n\npruned, as shown in {page}:\n{summary(pruned)}".rstrip(), flush=True)
    if check:
        example = Example("prompt", prompt, response, image=image, form=form)
        print(f"\n{checked_on(loaded, graphs, example, out)}")


def _check_free(paths: Iterable[Path], overwrite: bool) -> None:
    """Refuse names of folders, and of files where they are not to be replaced."""
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, and a file is to be written; choose another name")
        if path.exists() and not overwrite:
            raise UserError(f"{path}: already exists; choose another name or add --overwrite")


def _whole(found: AttributionGraph) -> str:
    """The unpruned graph in a few figures."""
    scores, n_edges = found.scores, len(found.weight)
    text = f"whole graph: {len(found.nodes):,} nodes, {n_edges:,} edges; replacement {scores.replacement_score:.3f}, "
    text += f"completeness {scores.completeness_score:.3f}; worst row gap {scores.worst_row_gap:.1e}"
    return text + (f"\n{found.left_out}; they carry {scores.left_out:.1%} of influence" if found.left_out else "")
