"""Circuits as one HTML file that opens offline, and as tables for a terminal."""

from importlib.resources import files
from pathlib import Path

import jinja2

from crosslayer.files import write_text
from crosslayer.hallucination.circuits.drawing import circuit_figure, foresight_figure, ranking_figure
from crosslayer.hallucination.circuits.record import Circuits

NODES, NODES_OF_PAIR = 34, 18
"""In the figure of a circuit, and of one pair's."""


def write_page(path: str | Path, found: Circuits, n_layers: int) -> None:
    """Write the page, atomically.

    Args:
        path: of the HTML file.
        found: the circuits.
        n_layers: of the model.
    """
    write_text(Path(path), page(found, n_layers))


def page(found: Circuits, n_layers: int) -> str:
    """The page that `write_page` writes."""
    source = files("crosslayer.hallucination.circuits").joinpath("circuits.html.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    small = {"width": 6.0, "height": 4.8}
    return template.render(
        found=found,
        whole=[circuit_figure(circuit.drawn[0], n_layers, NODES) for circuit in found.circuits],
        pairs=[circuit_figure(each, n_layers, NODES_OF_PAIR, **small) for each in found.circuits[-1].drawn[1:]],
        ranking=None if found.planted is None else ranking_figure(found.planted),
        foresight=foresight_figure(found.foresight),
    )
