"""What the hand-tuned forms bring on a whole pretraining step on a CPU: each is replaced by the plain one, in turn.

    python -m benchmarks.forms --size=paper --batch=512 --turns=7

``lloyd``: scores and sums of k-means in the form for CPUs (``clustering``). Sizes: ``paper``, or ``small`` (512 everywhere).
All programs live in one process and take turns; medians of seconds and of processor seconds are compared.
"""

import argparse
import statistics
import time

import jax.numpy as jnp

from benchmarks import step
from conclugen_jax.method import clustering

PLAIN = {
    "lloyd": {
        (clustering, "_first_best"): lambda scores: jnp.argmax(scores, axis=0).astype(jnp.int32),
        (clustering, "_added_sums"): clustering._product_sums,
    },
}
"""Form -> what stands in for it, by module and name."""


def trainer(form: str, **options) -> step.Trainer:
    """The program of a step in which one form is the plain one; ``none``: all as they are."""
    before = {place: getattr(*place) for place in PLAIN.get(form, {})}
    try:
        for (module, name), plain in PLAIN.get(form, {}).items():
            setattr(module, name, plain)
        return step.Trainer(**options)
    finally:
        for (module, name), own in before.items():
            setattr(module, name, own)


def main() -> None:
    """Time all programs in turn and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("paper", "small"), default="paper")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps a turn")
    a = parser.parse_args()
    sizes = step.PAPER if a.size == "paper" else step.SMALL
    programs = {form: trainer(form, batch=a.batch, num_clusters=a.clusters, **sizes) for form in ("none", *PLAIN)}
    seconds = {form: ([], []) for form in programs}
    for turn in range(-1, a.turns):
        for form, program in programs.items():
            wall, processor = time.perf_counter(), time.process_time()
            program.steps(a.steps)
            if turn >= 0:  # the first turn warms up
                seconds[form][0].append((time.perf_counter() - wall) / a.steps)
                seconds[form][1].append((time.process_time() - processor) / a.steps)
    now = [statistics.median(x) for x in seconds["none"]]
    print(f"{a.size}, batch {a.batch}, {a.turns} turns of {a.steps} steps; seconds a step, / with all forms")
    for form, (wall, processor) in seconds.items():
        median = [statistics.median(x) for x in (wall, processor)]
        shown = "  ".join(f"{x:8.4f} {x / y:5.2f}" for x, y in zip(median, now, strict=True))
        temporary = programs[form].program.memory_analysis().temp_size_in_bytes / 2**30
        print(f"without {form:8} wall, processor: {shown}  temporary {temporary:.2f} GiB")


if __name__ == "__main__":
    main()
