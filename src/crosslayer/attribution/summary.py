"""An attribution graph in words, for a terminal."""

from collections import Counter

import numpy as np

from crosslayer.attribution.graph import AttributionGraph
from crosslayer.attribution.paths import Path, path_lengths, top_paths

PLURALS = {"patch": "patches", "bias": "biases"}


def summary(graph: AttributionGraph, n_paths: int = 8, n_features: int = 10) -> str:
    """Scores, targets, the strongest paths from words and patches, and the most influential features.

    Args:
        graph: pruned or not.
        n_paths: how many paths to show.
        n_features: how many features to show.
    """
    paths = [_path_line(graph, path) for path in top_paths(graph, n_paths)]
    blocks = [
        _heading(graph),
        _block("targets", _targets(graph)),
        _block("strongest paths, with their share of influence and sign", paths),
        _block("features by influence", _features(graph, n_features)),
    ]
    return "\n\n".join(block for block in blocks if block)


def _heading(graph: AttributionGraph) -> str:
    counts = Counter(node.kind for node in graph.nodes)
    kinds = ", ".join(f"{n:,} {kind if n == 1 else PLURALS.get(kind, kind + 's')}" for kind, n in counts.items())
    scores, lengths = graph.scores, path_lengths(graph)
    shares = [f"{length}: {share:.0%}" for length, share in enumerate(lengths.share) if share >= 0.005]
    note = f" ({graph.left_out})" if graph.left_out else ""
    return "\n".join(
        [
            f'"{graph.prompt}" through {graph.run or "a transcoder"} of {graph.model}',
            f"{kinds}; {len(graph.weight):,} edges",
            f"replacement score {scores.replacement_score:.3f}, completeness score {scores.completeness_score:.3f}",
            f"worst row gap {scores.worst_row_gap:.1e}; left out: {scores.left_out:.1%} of influence{note}",
            f"path length {lengths.mean:.2f} on average ({', '.join(shares)})",
        ]
    )


def _block(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)]) if lines else ""


def _targets(graph: AttributionGraph) -> list[str]:
    order = np.argsort(-graph.target_weight.numpy(force=True), kind="stable")
    targets = [i for i in order if graph.nodes[i].kind == "target"]
    return [f"{float(graph.target_weight[i]):6.3f}  {graph.captions[i]}" for i in targets]


def _path_line(graph: AttributionGraph, path: Path) -> str:
    names = [graph.captions[graph.index[id]] for id in path.nodes]
    return f"{path.strength:6.1%} {'+' if path.sign > 0 else '-'}  {' -> '.join(names)}"


def _features(graph: AttributionGraph, n: int) -> list[str]:
    features = np.flatnonzero(graph.of_kind("feature"))
    top = features[np.argsort(-graph.influence.node[features], kind="stable")][:n]
    lines = []
    for i in top:
        node = graph.nodes[i]
        active = "" if node.activation is None else f", active at {node.activation:.3g}"
        lines.append(f"{graph.influence.node[i]:6.1%}  {graph.captions[i]}{active}")
    return lines
