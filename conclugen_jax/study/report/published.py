"""The numbers published in the paper, for comparison."""

from conclugen_jax.study.results import MEASURES

SOURCE = (
    "Published numbers: Halawa, Blume, Bideau, Maier, Abdel Rahman, Hellwich: Multi-Task Multi-Modal Self-Supervised "
    "Learning for Facial Expression Recognition, CVPR Workshops 2024, arXiv 2404.10904."
)

CITED = "Halawa et al. 2024, arXiv 2404.10904"
"""The same in a few words."""

KINDS = {"cmu_mosei": "multi", "meld": "single", "caer": "single"}
"""Data set -> kind of the labels that its published numbers are about."""

TITLES = {
    "conclugen": "ConCluGen",
    "conclu": "ConClu",
    "congen": "ConGen",
    "multi_cont": "Multi-Cont",
    "instance_cont": "Instance-Cont",
    "generative": "Generative",
    "conclugen_vision": "ConCluGen/(vision)",
    "multi_cont_without_text": "Multi-Cont w/o text",
    "multi_cont_without_audio": "Multi-Cont w/o audio",
}
"""Method -> what the paper calls it."""

# In % and in the order of MEASURES, for CMU-MOSEI, MELD and CAER.
_LINEAR_EVALUATION = {
    "conclugen": ((60.4, 49.6, 41.7, 70.3), (56.6, 53.1, 58.5, 56.6), (37.5, 26.1, 34.8, 37.5)),
    "conclu": ((57.4, 43.9, 44.9, 60.5), (58.0, 54.7, 57.6, 58.0), (36.6, 24.0, 29.4, 36.6)),
    "congen": ((53.3, 39.2, 45.8, 58.4), (57.4, 52.7, 57.1, 57.4), (35.8, 22.5, 32.3, 35.8)),
    "multi_cont": ((56.4, 44.4, 43.9, 63.1), (57.2, 54.1, 57.6, 57.2), (34.6, 22.3, 30.7, 34.6)),
    "instance_cont": ((41.2, 43.3, 35.1, 77.1), (46.3, 32.1, 25.3, 46.3), (34.6, 17.8, 12.0, 34.6)),
    "generative": ((46.9, 49.2, 38.0, 87.8), (52.1, 40.9, 37.5, 52.1), (37.3, 23.9, 45.3, 37.3)),
    "conclugen_vision": ((52.4, 40.4, 38.2, 57.3), (31.0, 26.3, 28.7, 31.0), (36.1, 21.9, 32.5, 36.1)),
    "multi_cont_without_text": ((42.5, 27.3, 35.3, 53.1), (48.1, 31.4, 24.3, 48.1), (23.2, 16.8, 13.9, 23.2)),
    "multi_cont_without_audio": ((53.4, 47.4, 41.3, 75.9), (54.3, 46.9, 58.2, 54.3), (35.1, 19.3, 24.0, 35.1)),
}

# Accuracy in %, for CMU-MOSEI, MELD and CAER; the linear evaluation is ConCluGen's, as rounded in that table.
_ACCURACY = {
    "supervised": (57.88, 55.97, 34.43),
    "linear_evaluation": (60.0, 56.6, 37.5),
    "fine_tuning": (66.48, 60.03, 50.75),
}


def linear_evaluation(dataset: str, kind: str, method: str) -> dict[str, float]:
    """Return published scores, shares from 0 to 1, of the paper's table of linear evaluations; empty where it has none.

    The same corpus with labels of another kind has no published numbers. Methods are those of :data:`TITLES`.
    """
    if KINDS.get(dataset) != kind or method not in _LINEAR_EVALUATION:
        return {}
    scores = _LINEAR_EVALUATION[method][list(KINDS).index(dataset)]
    return {measure: round(score / 100, 4) for measure, score in zip(MEASURES, scores, strict=True)}


def accuracy(dataset: str, kind: str, method: str, protocol: str) -> float | None:
    """Return published accuracy, a share from 0 to 1, of the paper's table of protocols; ``None`` where it has none.

    The table has linear evaluation and fine-tuning of ConCluGen, and the supervised baseline.
    """
    if KINDS.get(dataset) != kind or (protocol != "supervised" and method != "conclugen") or protocol not in _ACCURACY:
        return None
    return round(_ACCURACY[protocol][list(KINDS).index(dataset)] / 100, 5)
