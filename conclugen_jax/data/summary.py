"""A built data set in a few lines."""

from pathlib import Path

from conclugen_jax.data import assembly
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.corpora import CORPORA, expected_counts


def describe(folder: Path, *, with_dropped: bool = True) -> list[str]:
    """Return lines on what was built, converted, left out (examples too, ``with_dropped``), and what is suspicious."""
    manifest = manifest_lib.read(folder)
    counts = ", ".join(f"{split} {facts['num_examples']:,}" for split, facts in manifest.splits.items())
    sizes = ", ".join(f"{m} {dim}" for m, dim in manifest.modalities.items())
    n, kind = len(manifest.label.names), manifest.label.kind
    labels = {"single": f"{n} classes", "multi": f"{n} labels", "value": "a number to predict", "none": "no labels"}[
        kind
    ]
    lines = [f"{folder}: {counts} examples; modalities {sizes}; {labels}"]
    for modality in manifest.modalities:
        missing = {s: f["num_examples"] - f["present"][modality] for s, f in manifest.splits.items()}
        if any(missing.values()):
            lines.append(f"{modality} is missing in " + ", ".join(f"{s} {n:,}" for s, n in missing.items() if n))
    for modality, n in manifest.source.get("unused", {}).items():
        lines.append(f"{n:,} vectors of {modality} belong to no row of the labels and were not used")
    if passed_over := manifest.source.get("passed_over"):
        lines.append(f"found beside the features and not used: {', '.join(passed_over)}")
    for kind, n in manifest.source.get("converted", {}).items():
        modality, dtype = kind.split()
        lines.append(f"{n:,} {dtype} vectors of {modality} were converted to float32")
    for modality, n in manifest.source.get("replaced", {}).items():
        lines.append(f"{n:,} values of {modality} were -inf and read as 0")
    if outside := manifest.source.get("rows_outside_folds", 0):
        lines.append(f"{outside:,} rows of the labels are of videos in no fold and were left out")
    dropped = {s: f["dropped"] for s, f in manifest.splits.items() if f["dropped"]}
    if dropped and with_dropped:
        lines.append(
            f"left out as bad: {', '.join(f'{s} {n:,}' for s, n in dropped.items())}; see {folder / assembly.DROPPED}"
        )
    corpus = CORPORA.get(str(manifest.source.get("dataset")))
    for n in expected_counts(corpus, {s: f["num_examples"] for s, f in manifest.splits.items()}).values():
        if n["found"] != n["expected"]:
            lines.append(f"{n['found']:,} examples; {n['expected']:,} are expected of the corpus")
    return lines + [f"warning: {warning}" for warning in manifest.warnings]
