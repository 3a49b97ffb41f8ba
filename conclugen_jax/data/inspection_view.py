"""Describe a built data set: in a few lines, or all that an inspection found, for a width of 80 columns."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from conclugen_jax.data import assembly, manifest as manifest_lib, persons
from conclugen_jax.data.corpora import CORPORA, expected_counts

Report = Mapping[str, Any]

RANGES_SHOWN = 20
"""Ranges of rows that a fault names, at most; the report itself has all."""

EMPTY = ("", None, [], {})


def render(report: Report) -> list[RenderableType]:
    """Return everything a report of :func:`conclugen_jax.data.inspection.inspect` says, in the order of interest.

    Text from the data set is escaped, so that none of it acts as markup.
    """
    parts: list[RenderableType] = [Text(f"{report['name']} {report['version']}", style="bold")]
    parts += [_line(report["description"]), _line(f"licence: {report['licence']}")]
    for section in (_splits, _labels, _modalities, _vectors, _twice, _origin, _files, _verdict):
        for part in section(report):
            parts.append(Text(f"\n{part}", style="bold") if isinstance(part, str) else part)
    return parts


def _line(text: str, depth: int = 0) -> Padding:
    return Padding(Text(text), (0, 0, 0, 2 + 2 * depth), expand=False)


def _items(lines: Iterable[str]) -> Padding:
    """Return a list, each entry of which may take several lines."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column()
    grid.add_column(overflow="fold")
    for line in lines:
        grid.add_row("-", Text(line))
    return Padding(grid, (0, 0, 0, 2), expand=False)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[int] = (0,)) -> Padding:
    """Return texts in columns; those numbered ``words`` are aligned left, the others, of numbers, right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, name in enumerate(columns):
        table.add_column(Text(name), justify="left" if i in words else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return Padding(table, (0, 0, 0, 2), expand=False)


def _splits(report: Report) -> Iterator[str | Padding]:
    """Yield titles, as text, and what is below them, as all sections do."""
    yield "Splits"
    counts = ("num_examples", "groups", "dropped")
    rows = [[split, *(f"{facts[key]:,}" for key in counts)] for split, facts in report["splits"].items()]
    yield _table(["split", "examples", "groups", "dropped"], rows)


def _labels(report: Report) -> Iterator[str | Padding]:
    for name, label in {"": report["label"], **report["targets"]}.items():
        found = {s: f["targets"][name] if name else f["label"] for s, f in report["splits"].items()}
        kind, names = label["kind"], label["names"]
        what = {"none": "none", "value": "a number", "single": f"one of {len(names)} classes"}
        yield f"{f'Target {name}' if name else 'Label'}: {what.get(kind, f'any of {len(names)} labels')}"
        if kind == "value":
            keys = ("mean", "std", "min", "max")
            rows = [[s, f"{f['known']:,}", *(_short(f[key]) for key in keys)] for s, f in found.items()]
            yield _table(["split", "known", *keys], rows)
        elif kind != "none":
            known = [f["known"] for f in found.values()]
            rows = [
                [each, *map(_share, [f["counts"][i] for f in found.values()], known)] for i, each in enumerate(names)
            ]
            totals = [f["num_examples"] for f in report["splits"].values()]
            unknown = np.subtract(totals, known).tolist()
            if any(unknown):
                rows.append(["(unknown)", *map(_share, unknown, totals)])
            yield _table(["name", *found], rows)
        shares = {s: f["explained_by_group"] for s, f in found.items() if f.get("explained_by_group") is not None}
        if shares:
            listed = ", ".join(f"{s} {100 * share:.1f}%" for s, share in shares.items())
            yield _items([f"share of its variance that the groups explain: {listed}", *_confounded(shares)])


def _confounded(shares: Mapping[str, float]) -> Iterator[str]:
    """Say that groups and labels belong together, if they do."""
    if max(shares.values()) > persons.CONFOUNDED:
        yield "groups differ in their labels: standardisation by person (data.standardize) would take away part of the label"


def _modalities(report: Report) -> Iterator[str | Padding]:
    splits, variants = report["splits"], report["variants"]
    yield "Modalities, and how many examples lack them"
    rows = []
    for m, dim in report["modalities"].items():
        missing = [_share(f["missing"][m], f["num_examples"]) if f["missing"][m] else "-" for f in splits.values()]
        rows.append([m, f"{dim:,}", *([f"{variants.get(m, 1)}"] if variants else []), *missing])
    yield _table(["modality", "size", *(["variants"] if variants else []), *splits], rows)
    kinds = dict.fromkeys(kind for facts in splits.values() for kind in facts["combinations"])
    if len(kinds) > 1:
        yield "Modalities that are there together"
        totals = [f["num_examples"] for f in splits.values()]
        counts = {k or "(none)": [f["combinations"].get(k, 0) for f in splits.values()] for k in kinds}
        yield _table(["modalities", *splits], ([k, *map(_share, n, totals)] for k, n in counts.items()))


def _vectors(report: Report) -> Iterator[str | Padding]:
    yield "Vectors"
    rows, remarks = [], []
    for m in report["modalities"]:
        for i, (split, facts) in enumerate(report["splits"].items()):
            f = facts["features"][m]
            norm = f"{_short(f['norm_mean'])} ± {_short(f['norm_std'])}" if f["vectors"] else "-"
            zeros = "-" if f["zero_share"] is None else f"{100 * f['zero_share']:.1f}%"
            rows.append(["" if i else m, split, f"{f['vectors']:,}", norm, _short(f["min"]), _short(f["max"]), zeros])
            shown, columns = ", ".join(map(str, f["first_constant_columns"])), f["constant_columns"]
            more = ", ..." if columns > len(f["first_constant_columns"]) else ""
            for count, noun, what in (
                (f["non_finite"], "value", "not finite (must be 0; --verify names the rows)"),
                (f["zero_vectors"], "vector", "zero throughout"),
                (columns, "column", f"constant ({shown}{more})"),
            ):
                if count:
                    remarks.append(f"{m}, {split}: {_number(count, noun)} {what}")
    yield _table(["modality", "split", "vectors", "L2 norm", "min", "max", "zeros"], rows, words=(0, 1))
    yield _line("")
    yield _items(remarks or ["every value is finite; no vector is zero throughout, no column constant"])


def _twice(report: Report) -> Iterator[str | Padding]:
    """Yield vectors, ids and groups that occur more than once."""
    yield "What is there twice"
    rows, remarks = [], []
    for m, found in report["duplicates"].items():
        for entry in [*({**e, "rows": {s: e["rows"]}} for s, e in found["within"].items()), *found["across"]]:
            rows.append([m, *_both(entry["rows"]), ", ".join(f"{a}={b}" for a, b in entry["pairs"])])
    if not rows:
        remarks.append("no two examples have the same vector")
    for noun in ("id", "group"):
        entries = report[f"shared_{noun}s"]
        rows += [[_number(e["count"], noun), *_both(e["rows"]), ", ".join(e["names"])] for e in entries]
        if not entries:
            remarks.append(f"no {noun} is in two splits")
    if report["shared_groups"] and report["shared_groups_by_design"]:
        remarks.append("the corpus has the same groups in several splits by design")
    if rows:
        yield _table(["same", "in", "examples", "such as"], rows, words=(0, 1, 3))
        yield _line("")
    if remarks:
        yield _items(remarks)
    if report["warnings"]:
        yield "Warnings when it was built"
        yield _items(report["warnings"])


def _both(rows: Mapping[str, int]) -> tuple[str, str]:
    return " + ".join(rows), " + ".join(f"{n:,}" for n in rows.values())


def _origin(report: Report) -> Iterator[str | Padding]:
    yield "Origin"
    for key, value in report["source"].items():
        if key != "notes":
            yield from _facts(key, value)
    for split, n in report["expected"].items():
        what = "all splits" if split == "all" else split
        same = "as many as" if n["found"] == n["expected"] else f"not the {n['expected']:,}"
        yield _line(f"{what}: {n['found']:,} examples, {same} expected of the corpus")
    yield _line(f"manifest: {report['fingerprint']}")
    if notes := report["source"].get("notes"):
        yield "Decided when it was built"
        yield _items(notes)


def _facts(name: str, value: Any, depth: int = 0) -> Iterator[Padding]:
    """Yield lines of what a manifest says; hashes are shortened, empty values are skipped."""
    if not isinstance(value, Mapping):
        if value not in EMPTY:
            yield _line(f"{name}: {_brief(value)}", depth)
        return
    inner = {k: v for k, v in value.items() if v not in EMPTY}
    if any(isinstance(v, Mapping) for v in inner.values()):
        yield _line(f"{name}:", depth)
        for k, v in inner.items():
            yield from _facts(k, v, depth + 1)
    elif inner:
        yield _line(f"{name}: " + ", ".join(f"{k} {_brief(v)}" for k, v in inner.items()), depth)


def _brief(value: Any) -> str:
    return re.sub(r"\A([0-9a-f]{12})[0-9a-f]{52}\Z", r"\1...", str(value))


def _files(report: Report) -> Iterator[str | Padding]:
    yield f"Files in {report['path']}"
    groups: dict[str, list[Mapping[str, int]]] = {}  # the shards of a split take one line
    for name, facts in report["files"].items():
        groups.setdefault(re.sub(r"\.array_record-.*", ".array_record-*", name), []).append(facts)
    rows = []
    for name, each in groups.items():
        records = f"{sum(f['records'] for f in each):,}" if "records" in each[0] else ""
        rows.append([name, f"{len(each):,}", records, _bytes(sum(f["bytes"] for f in each))])
    rows.append(["all", f"{len(report['files']):,}", "", _bytes(report["total_bytes"])])
    yield _table(["file", "number", "records", "size"], rows)
    if report["unlisted_files"]:
        yield _line(f"not of the data set: {', '.join(report['unlisted_files'])}")


def _verdict(report: Report) -> Iterator[str | Padding]:
    faults = report["faults"]
    yield "Verification"
    if report["verified"] != "records":
        yield _line("sizes of the files only; --verify compares every file, record and count with the manifest")
    elif not faults:
        yield _line("sound: hashes of all files, all records, counts, statistics, metadata of TFDS")
    else:
        yield _items(f"{fault['file']}: {_rows(fault['rows'])}{fault['what']}" for fault in faults)
    if any(fault["rows"] for fault in faults):
        yield _line("(rows are counted from 0 within the split)")


def _rows(ranges: Sequence[Sequence[int]]) -> str:
    if not ranges:
        return ""
    shown = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges[:RANGES_SHOWN])
    count = sum(b - a + 1 for a, b in ranges)
    more = f", ... ({count:,} in all, --json lists them)" if len(ranges) > RANGES_SHOWN else ""
    return f"row{'s' * (count > 1)} {shown}{more}: "


def _share(count: int, total: int) -> str:
    return f"{count:,} {100 * count / total:5.1f}%" if total else f"{count:,}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 or abs(value) >= 1e6 else f"{value:,.0f}"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _bytes(size: int) -> str:
    scale, unit = next(((s, u) for s, u in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if size >= s), (0, "B"))
    return f"{size / scale:.1f} {unit}" if scale else f"{size} B"


def describe(folder: Path, *, with_dropped: bool = True) -> list[str]:
    """Return lines on what was built, converted, dropped (examples too, ``with_dropped``), and what is suspicious."""
    manifest = manifest_lib.read(folder)
    counts = ", ".join(f"{split} {facts['num_examples']:,}" for split, facts in manifest.splits.items())
    sizes = ", ".join(f"{m} {dim}" for m, dim in manifest.modalities.items())
    n = len(manifest.label.names)
    kinds = {"single": f"{n} classes", "multi": f"{n} labels", "value": "a number to predict", "none": "no labels"}
    lines = [f"{folder}: {counts} examples; modalities {sizes}; {kinds[manifest.label.kind]}"]
    for modality in manifest.modalities:
        missing = {s: f["num_examples"] - f["present"][modality] for s, f in manifest.splits.items()}
        if any(missing.values()):
            lines.append(f"{modality} is missing in " + ", ".join(f"{s} {n:,}" for s, n in missing.items() if n))
    for fact, sentence in (
        ("unused", "{:,} vectors of {} belong to no row of the labels and were not used"),
        ("converted", "{0:,} {2} vectors of {1} were converted to float32"),
        ("replaced", "{:,} values of {} were -inf and read as 0"),
        ("left_out", "frames of {1} that were dropped ({2}): {0:,}"),
    ):
        lines += [sentence.format(n, *words.split(" ")) for words, n in manifest.source.get(fact, {}).items()]
    lines += manifest.source.get("notes", [])
    lines += [f"{m}: some ids of the labels are not there; {s}" for m, s in manifest.source.get("alike", {}).items()]
    if passed_over := manifest.source.get("passed_over"):
        lines.append(f"found beside the features and not used: {', '.join(passed_over)}")
    if outside := manifest.source.get("rows_outside_folds", 0):
        lines.append(f"{outside:,} rows of the labels are of videos in no fold and were dropped")
    dropped = {s: f["dropped"] for s, f in manifest.splits.items() if f["dropped"]}
    if dropped and with_dropped:
        bad = ", ".join(f"{s} {n:,}" for s, n in dropped.items())
        lines.append(f"dropped as bad: {bad}; see {folder / assembly.DROPPED}")
    corpus = CORPORA.get(str(manifest.source.get("dataset")))
    for n in expected_counts(corpus, {s: f["num_examples"] for s, f in manifest.splits.items()}).values():
        if n["found"] != n["expected"]:
            lines.append(f"{n['found']:,} examples; {n['expected']:,} are expected of the corpus")
    return lines + [f"warning: {warning}" for warning in manifest.warnings]
