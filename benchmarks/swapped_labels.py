"""How many labels that are swapped on purpose are found: python -m benchmarks.swapped_labels --data DATA [--run RUN]

Of 5 % of the rows, drawn at random, the label becomes another class at random. Printed is the share of these among the first
7 % of the rows as ``conclugen oddities`` ranks them, for each seed.
"""

import argparse

import numpy as np

from conclugen_jax.data import shards
from conclugen_jax.evaluate import mislabelled, odd_rows, oddities, similar
from conclugen_jax.runs import workdir as workdir_lib

SWAPPED, LOOKED_AT = 0.05, 0.07


def share_found(rows: odd_rows.Rows, vectors: np.ndarray, seed: int) -> float:
    """Return the share of swapped labels among the first rows of the ranking by vectors [n, dim]."""
    rng, n, classes = np.random.default_rng(seed), len(rows.ids), len(rows.names)
    swapped = rng.choice(n, round(SWAPPED * n), replace=False)
    labels = rows.label.copy()
    labels[swapped] = (labels[swapped] + rng.integers(1, classes, len(swapped))) % classes
    folds = mislabelled.folds(labels, rows.groups, similar.copies(rows.features, rows.present))
    found = mislabelled.confident(mislabelled.out_of_fold(vectors, labels, folds, classes), labels)
    return float(np.isin(swapped, odd_rows.ranked(found)[: round(LOOKED_AT * n)]).mean())


def main() -> None:
    """Print the shares for one data set, by raw features or by a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", default="")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    dataset = shards.open_dataset(args.data)
    configs = {args.run: workdir_lib.read_config(args.run)} if args.run else {}
    rows = odd_rows.read(dataset, list(dataset.manifest.modalities), [], oddities.MOST_ROWS)
    methods, said = oddities.vectors_of(rows, dataset.manifest, configs)
    for name, fused in methods.items():
        shares = [share_found(rows, fused(()), seed) for seed in range(args.seeds)]
        each = ", ".join(f"{share:.1%}" for share in shares)
        print(f"{name}: {np.mean(shares):.1%} of the swapped labels in the first {LOOKED_AT:.0%} ({each})")
    print(f"{dataset.manifest.name}, {len(rows.ids):,} rows, {said}")


if __name__ == "__main__":
    main()
