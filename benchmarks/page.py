"""Write docs/benchmarks.md from the files in benchmarks/results, one a machine: python -m benchmarks.page

A file has ``machine``, ``versions``, ``date``, ``command``, ``rows`` and optionally ``notes`` (paragraphs). A row has
``measure``, what ``ours`` took, its ``unit``, and optionally other sides by name, ratios (names with " / " or "rates divided
out") and ``command``.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
DIVIDED = "rates divided out"  # ratio of times where both libraries would multiply at one rate
HEAD = f"""# Benchmarks

`make bench TORCH_PYTHON=PYTHON_WITH_TORCH` measures on a processor and writes this page, in about 15 minutes on two idle cores;
`python -m benchmarks.gpu --torch-python=PYTHON_WITH_TORCH --json=benchmarks/results/NAME.json` on a GPU. Both sides take
turns in processes of their own, figures are medians. A step is nearly all matrix products, so a ratio of times is also one of
product libraries: where it says "{DIVIDED}", the rates of a plain 4096 x 4096 x 4096 product of both are taken out.
"""
TAIL = """## Not measured

Any TPU, several GPUs, any published table. `configs/conclugen.py` holds the paper's hyper-parameters; whether it reproduces the
paper's scores is unknown until someone runs it on the paper's features.
"""


def text(results: Path = RESULTS) -> str:
    """Return the page: ratios of measures that several machines have, side by side, then all rows of each machine."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    parts = [HEAD, _beside([one for one in found if one.get("rows")])]
    for one in found:
        said = "; ".join(f"{side}: {', '.join(map(str, facts.values()))}" for side, facts in one["versions"].items())
        parts.append(f"## {one['machine']}\n\n{one['date']}, `{one['command']}`. Versions: {said}.\n")
        rows = [[r["measure"], _own(r), _sides(r), _ratios(r), _command(r)] for r in one["rows"]]
        parts.append(_table(["what", "ours", "others", "ratio", "command"], rows))
        parts += [f"{note}\n" for note in one.get("notes", [])]
    return "\n".join([*filter(None, parts), TAIL])


def keep(found: Mapping[str, Any], before: Mapping[str, Any], file: Path) -> None:
    """Write what was found on a machine to its file, with the rows of before that were not measured again."""
    new = {row["measure"] for row in found["rows"]}
    rows = [row for row in before["rows"] if row["measure"] not in new]
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {**before, **found, "rows": [*found["rows"], *rows]}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write() -> None:
    """Write the page."""
    PAGE.write_text(text(), encoding="utf-8")


def _beside(found: list[Mapping[str, Any]]) -> str:
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for one in found:
        for row in one["rows"]:
            for key in sorted(filter(_is_ratio, row), key=lambda key: key != DIVIDED):
                cells.setdefault((row["measure"], key), {})[one["machine"]] = _number(row[key])
    machines = [one["machine"] for one in found]
    rows = [[*name, *(by.get(m, "") for m in machines)] for name, by in cells.items() if len(by) > 1]
    used = [i for i in range(len(machines)) if any(row[2 + i] for row in rows)]
    head = ["what", "ratio", *(machines[i] for i in used)]
    return _table(head, [[*row[:2], *(row[2 + i] for i in used)] for row in rows]) if rows else ""


def _is_ratio(key: str) -> bool:
    return " / " in key or key == DIVIDED


def _own(row: Mapping[str, Any]) -> str:
    return _with_unit(row["ours"], row) if "ours" in row else ""


def _sides(row: Mapping[str, Any]) -> str:
    others = {
        key: x for key, x in row.items() if key not in ("measure", "ours", "unit", "command") and not _is_ratio(key)
    }
    return "; ".join(f"{key} {_with_unit(x, row)}" for key, x in others.items())


def _ratios(row: Mapping[str, Any]) -> str:
    return "; ".join(f"{key} {_number(row[key])}" for key in row if _is_ratio(key))


def _command(row: Mapping[str, Any]) -> str:
    return f"`{row['command']}`" if "command" in row else ""


def _with_unit(x: Any, row: Mapping[str, Any]) -> str:
    return f"{_number(x)} {row.get('unit', '')}".strip() if isinstance(x, (int, float)) else _number(x)


def _number(x: Any) -> str:
    if isinstance(x, (list, tuple)):
        return ", ".join(map(_number, x))
    if isinstance(x, float):
        return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    return f"{x:,}" if isinstance(x, int) else str(x)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head, rows = list(head), [list(row) for row in rows]
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]  # no column without a word
    lines = [[head[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    write()
