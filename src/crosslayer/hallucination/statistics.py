"""How firmly a feature tells hallucinated mentions from true ones: pure functions of arrays.

Axes: N mentions, F features, B resamples, K features chosen.
"""

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from scipy.sparse import csr_array
from scipy.stats import false_discovery_control, mannwhitneyu, norm, rankdata


def mann_whitney(
    x: Float[np.ndarray, "N F"], hallucinated: Bool[np.ndarray, " N"]
) -> tuple[Float64[np.ndarray, " F"], Float64[np.ndarray, " F"]]:
    """AUROC of each feature (above 0.5: it fires more where a mention is hallucinated), and its two-sided p-value.

    The p-value is that of the normal approximation, corrected for ties, of which zeros make many.

    Args:
        x: activations; no feature may be the same everywhere.
        hallucinated: of each mention.
    """
    these, those = (x[side].astype(np.float64) for side in (hallucinated, ~hallucinated))  # p-values keep x's precision
    found = mannwhitneyu(these, those, axis=0, method="asymptotic")
    return found.statistic / (len(these) * len(those)), found.pvalue


def van_elteren(
    x: Float[np.ndarray, "N F"], hallucinated: Bool[np.ndarray, " N"], stratum: Int[np.ndarray, " N"]
) -> tuple[Float64[np.ndarray, " F"], Float64[np.ndarray, " F"]]:
    """The same with mentions compared within their stratum only: AUROC and p-value.

    Each stratum of n hallucinated and m true mentions gives its Mann-Whitney U, centred, with the weight
    1 / (n + m + 1), which is locally the most powerful. The variance is that of the ranks found under permutation, so
    ties are taken care of. Where the strata tell nothing of a feature, its AUROC is 0.5 and p is 1. Source: van
    Elteren, "On the combination of independent two-sample tests of Wilcoxon", 1960; Lehmann, "Nonparametrics",
    section 3.3.
    """
    u, pairs, variance = np.zeros(x.shape[1]), 0.0, np.zeros(x.shape[1])
    for number in np.unique(stratum):
        rows = stratum == number
        N, n = int(rows.sum()), int(hallucinated[rows].sum())
        if n in (0, N):
            continue
        ranks = rankdata(x[rows], axis=0)
        u += (ranks[hallucinated[rows]].sum(0) - n * (n + 1) / 2) / (N + 1)
        pairs += n * (N - n) / (N + 1)
        variance += n * (N - n) / N * ranks.var(0, ddof=1) / (N + 1) ** 2
    z = np.divide(u - pairs / 2, np.sqrt(variance), out=np.zeros_like(u), where=variance > 0)
    return u / pairs if pairs else np.full(len(u), 0.5), 2 * norm.sf(np.abs(z))


def benjamini_hochberg(p: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
    """The q-value of each p-value: the false discovery rate of all that are as small (Benjamini and Hochberg 1995)."""
    return np.asarray(false_discovery_control(p)) if len(p) else p


def matched_weights(
    hallucinated: Bool[np.ndarray, " N"], stratum: Int[np.ndarray, " N"], counts: Float64[np.ndarray, "B N"]
) -> tuple[Float64[np.ndarray, "B N"], Float64[np.ndarray, "B N"]]:
    """Weights of a mean over hallucinated mentions, and of one over true mentions with the same make-up of strata.

    In each resample, true mentions weigh together, stratum by stratum, as much as hallucinated ones; strata without
    both have no part. Rows sum to 1; those of a resample in which nothing is matched are NaN.
    """
    member = (stratum[:, None] == np.arange(stratum.max() + 1)).astype(np.float64)
    these, those = (counts * side @ member for side in (hallucinated, ~hallucinated))
    both = (these > 0) & (those > 0)
    share = np.divide(these, those, out=np.zeros_like(these), where=both)
    total = (these * both).sum(1, keepdims=True)
    total[total == 0] = np.nan
    return counts * hallucinated * both[:, stratum] / total, counts * ~hallucinated * share[:, stratum] / total


def interval(values: Float64[np.ndarray, "B *K"]) -> tuple[Float64[np.ndarray, "*K"], Float64[np.ndarray, "*K"]]:
    """The 95 % percentile interval over resamples, those without a value left out."""
    low, high = np.nanpercentile(values, (2.5, 97.5), axis=0)
    return low, high


def drive(these: Float64[np.ndarray, "*F"], those: Float64[np.ndarray, "*F"]) -> Float64[np.ndarray, "*F"]:
    """How much a feature adds to hallucinated decisions beyond what it adds to true ones.

    That is h - t, and h where t is below zero: what holds true mentions back drives no hallucination by being away.
    """
    return these - np.maximum(those, 0.0)


def best_first(score: Float64[np.ndarray, " F"], preferred: Bool[np.ndarray, " F"]) -> Int[np.ndarray, " F"]:
    """Features in their order: those preferred first, then by score, the largest first."""
    return np.lexsort((np.arange(len(score)), -score, ~preferred))


def top_share(
    weights: tuple[Float64[np.ndarray, "B N"], Float64[np.ndarray, "B N"]],
    x: csr_array,
    preferred: Bool[np.ndarray, " F"],
    k: int,
) -> Float64[np.ndarray, " F"]:
    """Share of resamples in which each feature is among the first k by `drive`.

    Args:
        weights: of hallucinated and of true mentions, by resample; resamples with NaN are left out.
        x: what each feature adds to each mention, N by F.
        preferred: see `best_first`.
        k: how many are the top.
    """
    hits, usable = np.zeros(len(preferred)), 0
    for these, those in zip(*weights, strict=True):
        if np.isfinite(these).all():
            hits[best_first(drive(x.T @ these, x.T @ those), preferred)[:k]] += 1
            usable += 1
    return hits / max(1, usable)


def correlations(x: Float[np.ndarray, "N K"], y: Float[np.ndarray, "N F"]) -> Float64[np.ndarray, "K F"]:
    """Pearson's r of each column with each; 0 with a column that is the same everywhere."""

    def standard(columns):
        centred = columns - columns.mean(0, dtype=np.float64)
        length = np.sqrt((centred**2).sum(0))
        return np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)

    return standard(x).T @ standard(y)
