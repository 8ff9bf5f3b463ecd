"""An aggregate and a contrast in words, for a terminal."""

from crosslayer.attribution.aggregate import Aggregate
from crosslayer.attribution.contrast import Change, Contrast
from crosslayer.metrics import Figure


def summary(found: Aggregate, n: int = 12) -> str:
    """Scores, and the nodes and edges of most influence.

    Args:
        found: the graphs, averaged.
        n: how many nodes and edges to show.
    """
    scores = found.scores
    heading = (
        f"{len(found):,} graphs; replacement score {scores['replacement_score']}, completeness score "
        f"{scores['completeness_score']}\n{len(found.nodes):,} nodes and {len(found.edges):,} edges are in the "
        f"circuits of {found.share:.0%} of the graphs or more; the edges of a circuit carry "
        f"{1 - scores['edges_left_out'].value:.0%} of the influence of all edges{_left_out(scores['left_out'].value)}"
    )
    nodes = [
        f"{row.influence}  {_signed(row.effect)}  in {row.active:4.0%}, circuit {row.kept:4.0%}  {row.role}"
        for row in found.nodes[:n]
    ]
    edges = [f"{row.influence}  {_signed(row.effect)}  {row.source} -> {row.target}" for row in found.edges[:n]]
    nodes_title = "nodes by influence, with their effect on the target in logits"
    return "\n\n".join([heading, _block(nodes_title, nodes), _block("edges by influence", edges)])


def contrast_summary(found: Contrast, n: int = 16) -> str:
    """How many nodes and edges changed and how, and the surest of them.

    Args:
        found: two sets of graphs, compared.
        n: how many nodes and edges to show.
    """
    nodes = [f"{_change(c)}  {c.role}" for c in found.nodes if c.change]
    edges = [f"{_change(c)}  {c.source} -> {c.target}" for c in found.edges if c.change]
    return "\n\n".join(
        [
            f"{found.n_here:,} graphs against {found.n_there:,}",
            _block(f"nodes: {_counts(found.nodes)}", nodes[:n]),
            _block(f"edges: {_counts(found.edges)}", edges[:n]),
        ]
    )


def _left_out(share: float) -> str:
    return f"; {share:.1%} of influence ends at features without a row of their own" if share > 0 else ""


def _counts(changes: tuple[Change, ...]) -> str:
    counts = [
        f"{sum(c.change == word for c in changes):,} {word}" for word in ("gained", "appeared", "lost", "suppressed")
    ]
    return f"{len(changes):,} compared, {', '.join(counts)} at q <= 5 %"


def _change(c: Change) -> str:
    influence, effect = c.influence, c.effect
    return (
        f"{c.change:10}  influence {influence.there:.4f} -> {influence.here:.4f} (q {influence.q:.1e})  "
        f"effect {effect.there:+.3f} -> {effect.here:+.3f} (q {effect.q:.1e})"
    )


def _signed(figure: Figure) -> str:
    return f"{figure.value:+.3f} [{figure.low:+.3f}, {figure.high:+.3f}]"


def _block(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)])
