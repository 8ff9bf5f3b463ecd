"""What a person reads: terminal tables, figures, and one self-contained HTML page."""

from importlib.resources import files
from math import isnan
from pathlib import Path

import jinja2
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from crosslayer.activations.manifest import Manifest
from crosslayer.activations.reading import check_trainable
from crosslayer.activations.rows import IMAGE, UNKNOWN
from crosslayer.activations.store import Store
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.demo import Arm, DemoResult
from crosslayer.drawing import data_url, svg
from crosslayer.errors import UserError
from crosslayer.evaluation import Evaluation
from crosslayer.files import size_text, write_text
from crosslayer.metrics import Figure
from crosslayer.models.load import LoadedModel
from crosslayer.planning import Estimate
from crosslayer.wiring import Wiring

COLOURS = {"plt": "#c2703d", "clt": "#2f6f8f", "clt-next": "#8a8f98"}


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = "  ".join("-" * width for width in widths)
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], rule, *lines[1:]])


def store_table(store: Store) -> str:
    """What a store holds, for a terminal; by layer what int8 is off by."""
    manifest, modality = store.manifest, store.column("modality")
    reads, writes = (f"{layers[0]} to {layers[-1]}" for layers in (manifest.x_layers, manifest.y_layers))
    size = sum((store.path / shard.file).stat().st_size for shard in manifest.shards)
    firsts, images = int((store.column("position") == 0).sum()), int((modality == IMAGE).sum())
    rows = [
        ["model", manifest.model or "not known"],
        ["revision", manifest.revision or "-"],
        ["layers", f"{manifest.n_layers} of width {manifest.d_model}"],
        ["reads", f"{manifest.read}, of layers {reads}"],
        ["writes", f"of layers {writes}"],
        ["numbers", manifest.dtype],
        ["tokens", f"{len(store):,}, {firsts:,} first positions"],
        ["of images", "not known" if (modality == UNKNOWN).any() else f"{images:,}"],
        ["on disk", f"{size_text(size)} in {len(manifest.shards):,} shards, {size_text(manifest.row_bytes)} a token"],
        ["trains", _trainable(store)],
        ["finished", "yes" if manifest.finished else "no: `crosslayer capture ... --resume` goes on"],
    ]
    rows += [[name, str(value)] for name, value in manifest.source.items() if value is not None]
    lines = [f"{name:<14}  {value}" for name, value in rows]
    if any(shard.x_error for shard in manifest.shards):
        header = ["layer", "reads off by", "writes off by"]
        lines += ["", table(header, _added_errors(manifest))]
    return "\n".join(lines)


def _trainable(store: Store) -> str:
    """Which wirings a training from this store can have."""
    refusals = _refusals(store)
    if refusals[0] is None:
        return "every wiring"
    return "wirings with first_target 1, of any span" if refusals[-1] is None else f"none: {refusals[-1]}"


def training_from(store: Store, model: str) -> str:
    """The command that trains from a store, after an empty line; nothing where none can."""
    refusals, kept = _refusals(store), store.manifest
    if None not in refusals:
        return ""
    options = {"revision": kept.revision, "read": kept.read if kept.read != "resid" else ""}
    options |= {"first-target": "1" if refusals[0] else ""}
    more = "".join(f" --{name} {value}" for name, value in options.items() if value)
    return f"\n\nnext: crosslayer train {model} --store {store.path}{more} --out RUN"


def _refusals(store: Store) -> list[str | None]:
    """Why a training cannot have wirings with first_target 0, and with 1 where there are two layers; None if it can."""
    n, refusals = store.manifest.n_layers, list[str | None]()
    for first_target in (0, 1)[:n]:
        try:
            check_trainable(store, Wiring.full(n, first_target))
            refusals.append(None)
        except UserError as error:
            refusals.append(str(error))
    return refusals


def _added_errors(manifest: Manifest) -> list[list[str]]:
    """By layer, the root of the mean share of the squares, in percent."""
    cells = []
    for name, layers in (("x_error", manifest.x_layers), ("y_error", manifest.y_layers)):
        shares = [sum(getattr(s, name)[i] * s.rows for s in manifest.shards) for i in range(len(layers))]
        percent = [f"{(share / manifest.rows) ** 0.5:.2%}" for share in shares]
        cells.append(dict(zip(layers, percent, strict=True)))
    reads, writes = cells
    return [[str(layer), reads.get(layer, "-"), writes.get(layer, "-")] for layer in sorted(reads | writes)]


def cost_table(estimate: Estimate, n_runs: int) -> str:
    """What a training costs, for a terminal, and what to do where it does not fit."""
    plan, room = estimate.plan, estimate.memory_room
    rows = [
        ["parameters", f"{plan.n_parameters:,}"],
        ["memory: weights", size_text(plan.weights)],
        ["memory: gradients", size_text(plan.gradients)],
        ["memory: moments", size_text(plan.moments)],
        ["memory: activations", size_text(plan.activations)],
        ["memory: in all", f"{size_text(plan.memory)} of {'?' if room is None else size_text(room)} free"],
        ["language model, loaded", size_text(estimate.model)],
        ["disk: finished run", size_text(plan.finished_run)],
        ["disk: at most", f"{size_text(plan.disk)} of {size_text(estimate.disk_room)} free"],
        ["time: capturing", duration(estimate.capture_seconds * n_runs)],
        ["time: training steps", duration((plan.seconds or 0.0) * n_runs)],
    ]
    lines = [table(["", "estimate" if n_runs == 1 else f"estimate, {n_runs} runs one after the other"], rows)]
    if room is not None and plan.memory > room:
        lines.append(f"does not fit into memory; what would: {', or '.join(estimate.proposals) or 'nothing we know'}")
    if plan.disk > estimate.disk_room:
        lines.append("does not fit on the disk; choose another --out")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds, for people to read."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def comparison(result: DemoResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the demo's table: an arm a row."""
    rows = [_comparison_row(result, arm) for arm in result.arms]
    return list(rows[0]), [list(row.values()) for row in rows]


def comparison_table(result: DemoResult) -> str:
    """The demo's table for a terminal, with a line on what its columns are."""
    legend = (
        "agreement: top-1, teacher-forced, on answer tokens of held-out scenes; generation: greedy tokens that match;\n"
        "loops: greedy answers that repeat themselves; "
        f"after {result.equal_time:.0f} s: agreement at equal training time, on validation scenes"
    )
    return f"{table(*comparison(result))}\n{legend}"


def evaluation_table(result: Evaluation) -> str:
    """One evaluation for a terminal: figures with intervals, then fvu and l0 by layer and modality."""
    names = {
        "top1_agreement": "top-1 agreement",
        "top1_agreement_filtered": f"  where right with < 80 % ({result.n_filtered} tokens)",
        "top1_agreement_text": "  all text positions",
        "generation_match": "generation match",
        "kl": "KL, nats a token",
        "cross_entropy_recovered": "cross-entropy recovered",
        "repetition_rate": "repetition rate",
        "degenerate_share": "answers that loop",
        "fvu": "fvu, mean over layers",
        "l0": "l0, all layers",
    }
    rows = [[title, *_cells(getattr(result, name))] for name, title in names.items()]
    rows.append(["dead fraction", f"{result.dead_fraction:.3f}", ""])
    head = f"{result.n_prompts} prompts, {result.n_tokens} scored tokens; speech: {result.verdict}"
    return f"{head}\n\n{table(['', 'value', '95 % interval'], rows)}\n\n{_layers_table(result)}"


def remarks(coder: CrossLayerTranscoder) -> list[str]:
    """What to know of a transcoder beside its figures: a norm of its own, layers without features or writers."""
    lines = [] if coder.input_norm is None else [f"encoders read x through a {coder.input_norm}"]
    for layer in range(coder.wiring.n_layers):
        if layer not in coder.sources:
            lines.append(f"layer {layer}: has no features")
        if not coder.wiring.n_sources(layer):
            bias = "its bias" if coder.b_dec[layer].any() else "zero"
            instead = "its original MLP is kept" if layer in coder.kept_layers else f"{bias} is written"
            lines.append(f"layer {layer}: no feature writes to it; {instead}")
    return lines


def inspection(model: LoadedModel, wiring: Wiring) -> str:
    """A model's sites, sizes and self-test for a terminal."""
    config = model.model.config.get_text_config()
    parameters = sum(p.numel() for p in model.model.parameters())
    image_token = getattr(model.model.config, "image_token_id", None)
    facts = [
        f"model           {model.id} ({type(model.model).__name__}, {parameters:,} parameters, {model.model.dtype})",
        f"decoder         {model.n_layers} layers, d_model {model.d_model}, vocabulary {config.vocab_size:,}",
        f"images          {'none' if image_token is None else f'at token {image_token}'}",
        f"processor       {'none' if model.processor is None else type(model.processor).__name__}",
        f"read            {model.sites.read}",
        *(f"note            {note}" for note in model.sites.notes),
    ]
    proof = model.proof
    assert proof is not None, "a sketch is never inspected"
    facts.append(f"self-replaced   logits differ by {proof.self_replacement_gap:.1e} relative")
    gaps = zip(model.sites.names, proof.residual_gaps, proof.locality_gaps, strict=True)
    rows = [[name, f"{residual:.1e}", f"{local:.1e}"] for name, residual, local in gaps]
    sites = table(["write site", "residual identity, relative gap", "change elsewhere"], rows)
    title = f"wiring: span {wiring.span}, first_target {wiring.first_target}, {wiring.n_pairs} decoders"
    return "\n".join(facts) + f"\n\n{sites}\n\n{title}\n{wiring.table()}"


def side_by_side(texts: dict[str, str]) -> str:
    """Several texts, each under its name."""
    width = max(len(name) for name in texts)
    return "\n".join(f"{name.ljust(width)}  {text!r}" for name, text in texts.items())


def write_report(path: Path, result: DemoResult) -> None:
    """The demo as one HTML file that opens offline: pictures, captions, figures, table."""
    template = jinja2.Template((files("crosslayer") / "report.html.jinja").read_text(encoding="utf-8"), autoescape=True)
    header, rows = comparison(result)
    page = template.render(
        result=result,
        header=header,
        rows=rows,
        colours=COLOURS,
        picture=data_url,
        figures={
            "agreement": svg(lambda ax: _agreement_bars(ax, result)),
            "seconds": svg(lambda ax: _agreement_by_seconds(ax, result)),
            "layers": svg(lambda ax: _fvu_by_layer(ax, result)),
            "training": svg(lambda ax: _training_curves(ax, result)),
        },
    )
    write_text(path, page)


def _comparison_row(result: DemoResult, arm: Arm) -> dict[str, str]:
    e = result.evaluations[arm.name]
    return {
        "arm": arm.name,
        "agreement": str(e.top1_agreement),
        "generation": str(e.generation_match),
        "loops": f"{e.degenerate_share.value:.0%}",
        f"after {result.equal_time:.0f} s": f"{arm.agreement_at(result.equal_time):.3f}",
        "KL": f"{e.kl.value:.3f}",
        "CE recovered": f"{e.cross_entropy_recovered.value:.3f}",
        "fvu": f"{e.fvu.value:.3f}",
        "l0": f"{e.l0.value:.1f}",
        "dead": f"{e.dead_fraction:.0%}",
        "tok/s": f"{arm.trainer.tokens / arm.seconds:,.0f}",
        "train s": f"{arm.seconds:.0f}",
    }


def _cells(figure: Figure) -> list[str]:
    if isnan(figure.value):
        return ["-", "nothing to measure"]
    interval = "too few prompts" if isnan(figure.low) else f"{figure.low:.3f} .. {figure.high:.3f}"
    return [f"{figure.value:.3f}", interval]


def _layers_table(result: Evaluation) -> str:
    modalities = list(result.layers)
    header = ["layer", *(f"{measure} {name}" for name in modalities for measure in ("fvu", "l0", "dead"))]
    rows = [
        [str(layer), *(cell for name in modalities for cell in _layer_cells(result, name, layer))]
        for layer in range(len(result.layers["all"]))
    ]
    return table(header, rows)


def _layer_cells(result: Evaluation, modality: str, layer: int) -> list[str]:
    figures = result.layers[modality][layer]
    fvu = figures.fvu.value
    return ["-" if isnan(fvu) else f"{fvu:.4f}", f"{figures.l0.value:.1f}", f"{figures.dead_fraction:.0%}"]


def _agreement_bars(ax: Axes, result: DemoResult) -> None:
    hesitant = next(iter(result.evaluations.values())).n_filtered
    measures = {
        "top1_agreement": "top-1\nagreement",
        "top1_agreement_filtered": f"top-1, {hesitant}\nhesitant tokens",
        "generation_match": "generation\nmatch",
    }
    width = 0.8 / len(result.arms)
    for i, arm in enumerate(result.arms):
        figures = [getattr(result.evaluations[arm.name], name) for name in measures]
        places = [j + (i - (len(result.arms) - 1) / 2) * width for j in range(len(measures))]
        errors = [[f.value - f.low for f in figures], [f.high - f.value for f in figures]]
        ax.bar(places, [f.value for f in figures], width * 0.92, color=COLOURS[arm.name], label=arm.name)
        ax.errorbar(places, [f.value for f in figures], errors, fmt="none", ecolor="#333333", capsize=2, lw=1)
    ax.set_xticks(range(len(measures)), list(measures.values()))
    ax.set_ylim(0, 1.02)
    ax.grid(axis="x", visible=False)
    ax.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.14))


def _agreement_by_seconds(ax: Axes, result: DemoResult) -> None:
    for arm in result.arms:
        seconds, values = [p.seconds for p in arm.probes], [p.top1_agreement for p in arm.probes]
        ax.plot(seconds, values, marker="o", ms=4, color=COLOURS[arm.name], label=arm.name)
    ax.axvline(result.equal_time, color="#bbbbbb", lw=1, ls="--")
    ax.set_ylim(0, 1.02)
    ax.set_xlim(left=0)
    ax.set_xlabel("seconds of its own training")
    ax.set_ylabel("top-1 agreement, validation")


def _fvu_by_layer(ax: Axes, result: DemoResult) -> None:
    for arm in result.arms:
        layers = result.evaluations[arm.name].layers["all"]
        ax.plot(range(len(layers)), [f.fvu.value for f in layers], marker="o", ms=4, color=COLOURS[arm.name])
    ax.set_yscale("log")
    ax.set_xticks(range(result.model.n_layers))
    ax.set_xlabel("layer whose MLP is reconstructed")
    ax.set_ylabel("fvu, held-out")


def _training_curves(ax: Axes, result: DemoResult) -> None:
    for arm in result.arms:
        ax.plot([m.tokens for m in arm.log], [m.fvu for m in arm.log], color=COLOURS[arm.name], lw=1.2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel("training tokens")
    ax.set_ylabel("fvu, training batch")
