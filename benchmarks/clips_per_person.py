"""How many clips of a person standardisation by person needs: accuracy against unlabelled clips per person of the test split.

    python -m benchmarks.clips_per_person --data DATA/ravdess_fold*of6/1.0.0 --run RUNS/person* --run_by_split RUNS/split*

Persons of the test split are standardised by n random clips of their own, and all of their clips are scored. ``--run``: a
pretraining run by person of each data set, ``--run_by_split``: one by split; without runs raw features alone are scored.
Vectors are chosen and smoothed as the runs say, raw features are smoothed alike; classifiers are those of ``probe``. A draw
takes other clips and other labels, the same for all rows of the table. Each number is the mean over the data sets, then
over the draws, in %, with its 95 % interval over the draws (Student's t): not over persons.
"""

import argparse
from typing import Any

import numpy as np

from conclugen_jax.data import batches, persons as persons_lib, shards
from conclugen_jax.evaluate import bank, probe, weights
from conclugen_jax.study import results
from configs import base

CLIPS = (1, 2, 5, 10, 20, 0)  # of a person of the test split; 0: all
LABELS = (2, 5, 20, 0)  # a class; 0: all


def accuracies(
    data: str, run: str, evaluation: Any, *, by_person: bool, num_draws: int
) -> dict[tuple[int, int], list[float]]:
    """Return (clips, labels) -> accuracy of each draw, of raw features where ``run`` is empty."""
    model, variables, config = probe.load(run) if run else (None, {}, base.get_config())
    dataset, modalities = shards.open_dataset(data), config.data.modalities
    modalities = modalities or list(dataset.manifest.modalities)
    streams = [shards.ShardStream(dataset, split, modalities) for split in ("train", "test")]
    groups = streams[1].names(np.arange(streams[1].num_examples))[1]
    if by_person:
        persons = weights.persons_of(run, variables, config) if run else persons_lib.fit(streams[0], config)
        persons.attach(streams[0])
    train, test = (batches.load(stream, tier="host").table for stream in streams)

    def fused(features: Any, present: Any) -> np.ndarray:
        return probe.concatenated(probe.represent(model, variables, features) if run else features, present)

    def by_clips(number: int, draw: int) -> dict[str, np.ndarray]:
        """Return test features standardised by some random clips of each person: others do not count as present."""
        known = np.isin(np.arange(len(groups)), probe.draw_labels(groups, number, seed=draw))
        present = {m: x & known for m, x in test["present"].items()}
        return persons.applied(test["features"], present, groups, data=dataset.manifest.name)

    found, trained = {}, fused(train["features"], train["present"])
    for draw in range(num_draws):
        seen = {n: by_clips(n, draw) for n in CLIPS} if by_person else {0: test["features"]}
        vectors = {str(n): bank.pair(trained, fused(x, test["present"]), evaluation) for n, x in seen.items()}
        options = {"labels_per_class": LABELS, "num_draws": 1, "seed": draw, "c_times_dim": evaluation.c_times_dim}
        for r in probe.label_efficiency(vectors, train["label"], test["label"], **options):
            found.setdefault((int(r.name), r.num_labels), []).append(r.accuracy[0])
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--run", nargs="*", default=[])
    parser.add_argument("--run_by_split", nargs="*", default=[])
    parser.add_argument("--draws", type=int, default=10, help="at least 2")
    a = parser.parse_args()
    evaluation = (
        probe.load((a.run + a.run_by_split)[0])[2] if a.run or a.run_by_split else base.get_config()
    ).evaluation
    kinds = {"raw features": ([""] * len(a.data), [""] * len(a.data)), "the run's vectors": (a.run_by_split, a.run)}
    print("| vectors | clips per person |", *(f"{k or 'all'} labels |" for k in LABELS))
    print("|---" * (2 + len(LABELS)) + "|")
    for kind, runs in kinds.items():
        for by_person in (False, True):
            options = {"by_person": by_person, "num_draws": a.draws}
            each = [
                accuracies(*x, evaluation, **options)
                for x in zip(a.data, runs[by_person], strict=bool(runs[by_person]))
            ]
            for clips in dict.fromkeys(clips for clips, _ in each[0]) if each else ():
                said = "by split" if not by_person else clips or "all"
                means = [results.interval(100 * np.mean([x[clips, k] for x in each], axis=0)) for k in LABELS]
                print(
                    f"| {kind} | {said} |",
                    *(f"{x['mean']:.1f} ± {x['interval'][1] - x['mean']:.1f} |" for x in means),
                    flush=True,
                )


if __name__ == "__main__":
    main()
