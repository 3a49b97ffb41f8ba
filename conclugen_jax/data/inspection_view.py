"""The report of an inspection as text and tables for a width of 80 columns."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Report = Mapping[str, Any]

RANGES_SHOWN = 20
"""Ranges of rows that a fault names, at most; the report itself has all."""


def render(report: Report) -> list[RenderableType]:
    """Everything a report of :func:`conclugen_jax.data.inspection.inspect` says, in the order of interest.

    Nothing of what the data set says of itself is taken for markup.
    """
    parts: list[RenderableType] = [*_heading(report), *_classes(report), *_modalities(report), *_vectors(report)]
    return [*parts, *_twice(report), *_origin(report), *_files(report), *_verdict(report)]


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _line(text: str, depth: int = 0) -> Padding:
    """A sentence, set in."""
    return Padding(Text(text), (0, 0, 0, 2 + 2 * depth), expand=False)


def _items(lines: Iterable[str]) -> Padding:
    """A list, each entry of which may take several lines."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column()
    grid.add_column(overflow="fold")
    for line in lines:
        grid.add_row("-", Text(line))
    return Padding(grid, (0, 0, 0, 2), expand=False)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = (0,)) -> Padding:
    """Texts in columns; those numbered ``words`` are set left, the others, of numbers, right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, name in enumerate(columns):
        table.add_column(Text(name), justify="left" if i in words else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return Padding(table, (0, 0, 0, 2), expand=False)


def _heading(report: Report) -> Iterator[RenderableType]:
    yield Text(f"{report['name']} {report['version']}", style="bold")
    yield _line(report["description"])
    yield _line(f"licence: {report['licence']}")
    yield _title("Splits")
    rows = []
    for split, facts in report["splits"].items():
        rows.append([split, f"{facts['num_examples']:,}", f"{facts['groups']:,}", f"{facts['dropped']:,}"])
    yield _table(["split", "examples", "groups", "left out"], rows)


def _classes(report: Report) -> Iterator[RenderableType]:
    labels = {"": report["label"], **report["targets"]}
    for name, label in labels.items():
        found = {s: f["targets"][name] if name else f["label"] for s, f in report["splits"].items()}
        title = f"Target {name}" if name else "Label"
        if label["kind"] == "none":
            yield _title(f"{title}: none")
        elif label["kind"] == "value":
            yield _title(f"{title}: a number")
            keys = ("mean", "std", "min", "max")
            rows = [[s, f"{f['known']:,}", *(_short(f[key]) for key in keys)] for s, f in found.items()]
            yield _table(["split", "known", *keys], rows)
        else:
            n = len(label["names"])
            yield _title(f"{title}: " + (f"one of {n} classes" if label["kind"] == "single" else f"any of {n} labels"))
            rows = []
            for i, each in enumerate(label["names"]):
                rows.append([each, *(_share(f["counts"][i], f["known"]) for f in found.values())])
            unknown = {s: report["splits"][s]["num_examples"] - f["known"] for s, f in found.items()}
            if any(unknown.values()):
                totals = [report["splits"][s]["num_examples"] for s in found]
                rows.append(["(unknown)", *(_share(n, t) for n, t in zip(unknown.values(), totals, strict=True))])
            yield _table(["name", *found], rows)


def _modalities(report: Report) -> Iterator[RenderableType]:
    splits = report["splits"]
    yield _title("Modalities, and how many examples lack them")
    variants = report["variants"]
    rows = []
    for m, dim in report["modalities"].items():
        cells = [f"{dim:,}"] + ([f"{variants.get(m, 1)}"] if variants else [])
        cells += [_share(f["missing"][m], f["num_examples"]) if f["missing"][m] else "-" for f in splits.values()]
        rows.append([m, *cells])
    yield _table(["modality", "size", *(["variants"] if variants else []), *splits], rows)
    kinds = dict.fromkeys(kind for facts in splits.values() for kind in facts["combinations"])
    if len(kinds) > 1:
        yield _title("Modalities that are there together")
        rows = []
        for kind in kinds:
            counts = {s: f["combinations"].get(kind, 0) for s, f in splits.items()}
            rows.append([kind or "(none)", *(_share(n, splits[s]["num_examples"]) for s, n in counts.items())])
        yield _table(["modalities", *splits], rows)


def _vectors(report: Report) -> Iterator[RenderableType]:
    yield _title("Vectors")
    rows, remarks = [], []
    for m in report["modalities"]:
        for i, (split, facts) in enumerate(report["splits"].items()):
            f = facts["features"][m]
            norm = f"{_short(f['norm_mean'])} ± {_short(f['norm_std'])}" if f["vectors"] else "-"
            zeros = "-" if f["zero_share"] is None else f"{100 * f['zero_share']:.1f}%"
            numbers = [f"{f['vectors']:,}", norm, _short(f["min"]), _short(f["max"]), zeros]
            rows.append(["" if i else m, split, *numbers])
            remarks += [f"{m}, {split}: {remark}" for remark in _remarks(f)]
    yield _table(["modality", "split", "vectors", "L2 norm", "min", "max", "zeros"], rows, words=(0, 1))
    yield Text("")
    yield _items(remarks or ["every value is finite; no vector is zero throughout, no column constant"])


def _remarks(facts: Mapping[str, Any]) -> Iterator[str]:
    if facts["non_finite"]:
        yield f"{_number(facts['non_finite'], 'value')} not finite (must be 0; --verify names the rows)"
    if facts["zero_vectors"]:
        yield f"{_number(facts['zero_vectors'], 'vector')} zero throughout"
    if facts["constant_columns"]:
        shown = facts["first_constant_columns"]
        more = ", ..." if facts["constant_columns"] > len(shown) else ""
        yield f"{_number(facts['constant_columns'], 'column')} constant ({', '.join(map(str, shown))}{more})"


def _twice(report: Report) -> Iterator[RenderableType]:
    """Vectors, ids and groups that are there more than once."""
    yield _title("What is there twice")
    rows, nothing = [], []
    for m, found in report["duplicates"].items():
        for split, entry in found["within"].items():
            rows.append([m, split, f"{entry['rows']:,}", _pairs(entry["pairs"])])
        for entry in found["across"]:
            rows.append([m, *_both(entry["rows"]), _pairs(entry["pairs"])])
    if not rows:
        nothing.append("no two examples have the same vector")
    for key, noun in (("shared_ids", "id"), ("shared_groups", "group")):
        for entry in report[key]:
            rows.append([f"{entry['count']:,} {noun}{'s' * (entry['count'] > 1)}", *_both(entry["rows"])])
            rows[-1].append(", ".join(entry["names"]))
        if not report[key]:
            nothing.append(f"no {noun} is in two splits")
    if rows:
        yield _table(["same", "in", "examples", "such as"], rows, words=(0, 1, 3))
        yield Text("")
    if report["shared_groups"] and report["shared_groups_by_design"]:
        nothing.append("the corpus has the same groups in several splits by design")
    if nothing:
        yield _items(nothing)
    if report["warnings"]:
        yield _title("Warnings when it was built")
        yield _items(report["warnings"])


def _both(rows: Mapping[str, int]) -> tuple[str, str]:
    return " + ".join(rows), " + ".join(f"{n:,}" for n in rows.values())


def _pairs(pairs: Sequence[Sequence[str]]) -> str:
    return ", ".join(f"{a}={b}" for a, b in pairs)


def _origin(report: Report) -> Iterator[RenderableType]:
    yield _title("Origin")
    for key, value in report["source"].items():
        for depth, line in _facts(key, value):
            yield _line(line, depth)
    for split, n in report["expected"].items():
        what = "all splits" if split == "all" else split
        same = "as many as" if n["found"] == n["expected"] else f"not the {n['expected']:,}"
        yield _line(f"{what}: {n['found']:,} examples, {same} expected of the corpus")
    yield _line(f"manifest: {report['fingerprint']}")


def _facts(name: str, value: Any, depth: int = 0) -> Iterator[tuple[int, str]]:
    """Lines of what a manifest says, with how deep it lies; hashes are shortened, what is empty is left out."""
    if not isinstance(value, Mapping):
        if value not in ("", None, [], {}):
            yield depth, f"{name}: {_brief(value)}"
        return
    inner = {k: v for k, v in value.items() if v not in ("", None, [], {})}
    if any(isinstance(v, Mapping) for v in inner.values()):
        yield depth, f"{name}:"
        for k, v in inner.items():
            yield from _facts(k, v, depth + 1)
    elif inner:
        yield depth, f"{name}: " + ", ".join(f"{k} {_brief(v)}" for k, v in inner.items())


def _brief(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _files(report: Report) -> Iterator[RenderableType]:
    yield _title(f"Files in {report['path']}")
    shards: dict[str, list[Mapping[str, int]]] = {}
    for name, facts in report["files"].items():
        # the shards of a split in one line: NAME-SPLIT.array_record-NNNNN-of-NNNNN
        stem, mark, _ = name.partition(".array_record-")
        shards.setdefault(f"{stem}.array_record-*" if mark and "records" in facts else name, []).append(facts)
    rows = []
    for name, each in shards.items():
        records = f"{sum(f['records'] for f in each):,}" if "records" in each[0] else ""
        rows.append([name, f"{len(each):,}", records, _bytes(sum(f["bytes"] for f in each))])
    rows.append(["all", f"{len(report['files']):,}", "", _bytes(report["total_bytes"])])
    yield _table(["file", "number", "records", "size"], rows)
    if report["unlisted_files"]:
        yield _line(f"not of the data set: {', '.join(report['unlisted_files'])}")


def _verdict(report: Report) -> Iterator[RenderableType]:
    faults = report["faults"]
    yield _title("Verification")
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
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
