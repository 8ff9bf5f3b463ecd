"""The evidence on an edit as one HTML file that opens offline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from math import isnan
from pathlib import Path

import jinja2
from matplotlib.axes import Axes
from PIL import Image

from crosslayer.data.images import open_image
from crosslayer.drawing import data_url, svg
from crosslayer.files import write_text
from crosslayer.hallucination.prove.findings import WORDS, findings, goals
from crosslayer.hallucination.prove.proof import LESS, Proof
from crosslayer.hallucination.responses import CAPTION, Response, read_responses
from crosslayer.hallucination.suppress.everything import BESIDE, RANDOM_DIRECTIONS, RANDOM_FEATURES
from crosslayer.hallucination.suppress.figures import RETAINED
from crosslayer.hallucination.suppress.outcome import answers_path
from crosslayer.hallucination.suppress.protocol import BEFORE
from crosslayer.metrics import Figure

KEPT, OTHER, PLAIN, DIRECTIONS = "#2f6f8f", "#c2703d", "#8a8f98", "#b9a44c"
HEADLINES = (("absent_named", "chair_s"), ("absent_affirmed", "false_yes"))
"""Of captions and of questions: the first of each that was measured."""
SIDE = 144
"""Of a picture on the page, in pixels, at least."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A caption before and after, with its picture."""

    title: str
    response: Response
    after: Response
    picture: str


def write_page(path: Path, proof: Proof, folder: Path, stages: Mapping[str, str]) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        proof: the evidence.
        folder: of results, from which pictures and answers are read.
        stages: names of the files that the page leads on to, with what they hold.
    """
    source = files("crosslayer.hallucination.prove").joinpath("page.html.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    heads = [next(name for name in names if name in proof.edit.changes) for names in HEADLINES if _any(proof, names)]
    page = template.render(
        proof=proof,
        words=WORDS,
        heads=heads,
        findings=findings(proof),
        goals=goals(proof),
        less=[m.name for m in LESS if m.name in proof.edit.changes],
        retained=[m.name for m in RETAINED if m.name in proof.edit.changes],
        examples=examples(folder, proof.kept),
        stages=stages,
        signed=signed,
        title=title,
        figures={
            "doses": [svg(partial(_doses, proof=proof, name=name)) for name in heads],
            "kl": [svg(partial(_by_kl, proof=proof, name=name)) for name in heads],
            "forest": [svg(partial(_forest, proof=proof, name=name), (5.6, 0.8 + 0.36 * _n(proof))) for name in heads],
            "chance": [svg(partial(_chance, proof=proof, name=name), (5.6, 2.4)) for name in heads],
        },
    )
    write_text(path, page)


def examples(folder: Path, kept: str) -> list[Shown]:
    """Captions that the edit frees of hallucination, one that stays as it was, and one that loses something true."""
    before, after = (read_responses(answers_path(folder, name)) for name in (BEFORE, kept))
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b.kind == CAPTION and b.image is not None]
    wanted = (
        ("hallucination gone", 3, lambda b, a: b.hallucinates and not a.hallucinates and _true(b) <= _true(a)),
        ("partner really there, kept", 1, lambda b, a: b.setting == "together" and _true(b) == _true(a)),
        ("hallucination stays", 1, lambda b, a: b.hallucinates and a.hallucinates),
        ("something true lost", 1, lambda b, a: not _true(b) <= _true(a)),
    )
    return [
        Shown(title=name, response=b, after=a, picture=_picture(folder / str(b.image)))
        for name, n, fits in wanted
        for b, a in [pair for pair in pairs if fits(*pair)][:n]
    ]


def signed(figure: Figure) -> str:
    """A difference with its interval."""
    if isnan(figure.low):
        return f"{figure.value:+.3f}"
    return f"{figure.value:+.3f} [{figure.low:+.3f}, {figure.high:+.3f}]"


def title(method: str) -> str:
    """A method, for people."""
    return {BESIDE: "run beside (PLT)", "mean-difference": "difference of means", "probe": "linear probe"}.get(
        method, method
    )


def _any(proof: Proof, names: Sequence[str]) -> bool:
    return any(name in proof.edit.changes for name in names)


def _n(proof: Proof) -> int:
    return len(proof.methods) + 1


def _true(response: Response) -> set[str]:
    return {mention.object for mention in response.mentions if not mention.hallucinated}


def _picture(path: Path) -> str:
    picture = open_image(path)
    if picture.width > 2 * SIDE:
        picture = picture.resize((2 * SIDE, round(picture.height * 2 * SIDE / picture.width)), Image.Resampling.LANCZOS)
    return data_url(picture, max(1, SIDE // picture.width))


def _colour(proof: Proof, method: str) -> str:
    return KEPT if method == proof.kept else OTHER if method == BESIDE else PLAIN


def _doses(ax: Axes, *, proof: Proof, name: str) -> None:
    for method, points in proof.doses.items():
        some = [(point.strength, point.figures[name]) for point in points]
        _curve(ax, some, _colour(proof, method), title(method))
    ax.axvline(0, color="#bbbbbb", lw=1, ls="--")
    ax.axvline(proof.edit.strength, color=KEPT, lw=1, ls=":")
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("strength (1: as chosen; below 0: written once more)")
    ax.set_ylabel(name)
    ax.legend(frameon=False)


def _by_kl(ax: Axes, *, proof: Proof, name: str) -> None:
    for method, points in proof.doses.items():
        some = [(point.kl, point.figures[name]) for point in points if point.strength >= 0]
        _curve(ax, some, _colour(proof, method), title(method))
    ax.set_ylim(0, 1.02)
    ax.set_xlim(left=0)
    ax.set_xlabel("collateral KL, nats a token of clean responses")
    ax.set_ylabel(name)
    ax.legend(frameon=False)


def _curve(ax: Axes, some: Sequence[tuple[float, Figure]], colour: str, label: str) -> None:
    x, figures = zip(*some, strict=True)
    ax.plot(x, [f.value for f in figures], marker="o", ms=4, color=colour, label=label)
    ax.fill_between(x, [f.low for f in figures], [f.high for f in figures], color=colour, alpha=0.15, lw=0)


def _forest(ax: Axes, *, proof: Proof, name: str) -> None:
    before = proof.edit.changes[name].before
    rows = [("as it is", before, "#22262b")]
    rows += [(title(t.method), t.changes[name].after, _colour(proof, t.method)) for t in proof.methods]
    for place, (_, figure, colour) in enumerate(rows):
        error = [[figure.value - figure.low], [figure.high - figure.value]]
        ax.errorbar(figure.value, -place, xerr=error, fmt="o", ms=6, color=colour, capsize=3)
    ax.axvline(before.value, color="#bbbbbb", lw=1, ls="--")
    ax.set_yticks([-place for place in range(len(rows))], [label for label, _, _ in rows])
    ax.set_xlim(-0.02, 1.02)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(name)


def _chance(ax: Axes, *, proof: Proof, name: str) -> None:
    lines = {RANDOM_FEATURES: PLAIN, RANDOM_DIRECTIONS: DIRECTIONS}
    found = [chance for chance in proof.chance if chance.measure == name]
    for place, chance in enumerate(found):
        jitter = [-place + 0.12 * ((i % 5) - 2) for i in range(len(chance.drawn))]
        ax.scatter(chance.drawn, jitter, s=22, color=lines.get(chance.draws, PLAIN), alpha=0.8)
        ax.axvline(chance.before, color="#bbbbbb", lw=1, ls="--")
        ax.axvline(chance.edited, color=KEPT, lw=2)
    ax.set_yticks([-place for place in range(len(found))], [chance.draws.replace("-", "\n") for chance in found])
    ax.set_ylim(-len(found) + 0.4, 0.6)
    ax.set_xlim(-0.02, 1.02)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(f"{name}; solid: the edit, dashed: as it is")
