"""Numbers that become NaN, and data that is too small."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from faults.harness import Place, Tally, differences, refusal, state_of


def _features(
    place: Place, name: str, num: int, *, constant: bool = False, classes: int = 2, greatest: float = 0.0
) -> Path:
    """Build a data set of a few examples of two modalities; the first may be constant, or have one huge row."""
    source, rng = place.folder / f"{name}source", np.random.default_rng(place.random.getrandbits(32))
    source.mkdir()
    ids = [f"clip{i}" for i in range(num)]
    for modality in ("video", "audio"):
        x = np.ones((num, 8), np.float32) if constant and modality == "video" else rng.normal(size=(num, 8))
        x[3:4] += greatest
        np.save(source / f"{modality}.npy", x.astype(np.float32))
        (source / f"{modality}.txt").write_text("\n".join(ids))
    rows = [f"{k},{'train' if i < num - 2 or num < 3 else 'test'},c{i % classes},g{i}" for i, k in enumerate(ids)]
    (source / "labels.csv").write_text("id,split,label,group\n" + "\n".join(rows) + "\n")
    command = ["launch.build_dataset", "--dataset=features", f"--name={name}", f"--source={source}"]
    place.ok([*command, f"--data_dir={place.folder / 'small'}"])
    return place.folder / "small" / name / "1.0.0"


def numbers(place: Place, seconds: float) -> Iterator[Tally]:
    """Train on degenerate data, at a huge rate, and with steps to skip."""
    small = {
        "a column that is the same in all rows": {"num": 40, "constant": True},
        "examples of one class only": {"num": 40, "classes": 1},
        "one example": {"num": 1},
        "a row of numbers so great that losses are NaN": {"num": 40, "greatest": 1e30},
    }
    options = [
        "--config.data.modalities=('video','audio')",
        "--config.train.batch_size=8",
        "--config.online_probe.every_epochs=0",
    ]
    for fault, what in small.items():
        tally, name = Tally(fault), f"small{place.random.getrandbits(32):x}"
        # Standardisation would divide by what is huge.
        raw = ["--config.data.standardize=none"] if "greatest" in what else []
        code, out = place.run(place.pretrain(name, *options, *raw, data=_features(place, name, **what)))
        lines = state_of(place.folder / name)["metrics.jsonl"] if code == 0 else []
        finite = lines and all(line.get("left_out") or line["loss"] == line["loss"] for line in lines)
        noted = "greatest" not in what or (place.folder / name / "bad_steps.jsonl").is_file()
        tally.count("survived" if finite and noted else refusal(code, out) or f"{name}: exit code {code}: {out[-400:]}")
        yield tally
    cases = {
        "NaN by a huge rate": ["--config.optimizer.learning_rate=900", "--config.optimizer.name=sgd"],
        "a batch larger than the data": ["--config.train.batch_size=4000"],
        "more clusters than points": ["--config.clustering.num_clusters=4000"],
    }
    for fault, options in cases.items():
        tally, name = Tally(fault), place.fresh()
        code, out = place.run(place.pretrain(name, *options))
        tally.count(refusal(code, out) or f"{name}: exit code {code}: {out[-400:]}")
        yield tally
    tally, name = Tally("steps told to be skipped: the rest is trained, and again the same"), place.fresh()
    states = []
    for copy in (name, f"{name}b"):
        (place.folder / copy).mkdir()
        (place.folder / copy / "bad_steps.jsonl").write_text(json.dumps({"step": 7}) + "\n")
        code, out = place.run(place.pretrain(copy))
        states.append(state_of(place.folder / copy) if code == 0 else {"out": out})
    finite = all(line.get("left_out") or line["loss"] == line["loss"] for line in states[0].get("metrics.jsonl", []))
    same = "out" not in states[0] and not differences(*states) and finite
    tally.count("survived" if same else f"{name}: {states[0].get('out', 'differs')}")
    yield tally
