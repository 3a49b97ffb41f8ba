"""The scores of a study as tables on a terminal."""

import sys

from conclugen_jax.commands import app


def show(results: dict) -> None:
    """Print a table of each data set and protocol, and the classes that are never predicted."""
    from conclugen_jax.study import study

    for dataset, protocol in dict.fromkeys((s["dataset"], s["protocol"]) for s in results["summary"]):
        rows = study.chosen(results["summary"], dataset=dataset, protocol=protocol)
        _table(results["methods"], rows, results["comparisons"])
        _warn(results["methods"], rows)
    for protocol in dict.fromkeys(one["protocol"] for one in results.get("across", [])):
        _across(results["methods"], study.chosen(results["across"], protocol=protocol))


def _across(methods: dict, rows: list[dict]) -> None:
    """Print the scores of classifiers on other data sets, beside those on the same classes of their own."""
    measure = next(iter(rows[0]["scores"]))
    cells = []
    for row in rows:
        place = row["dataset"], row["test_data"], methods[row["method"]]["title"], str(row["labels_per_class"] or "all")
        shown = [_shown(row[side][measure], measure) for side in ("within", "scores")]
        cells.append(
            [*place, str(len(row["classes"]) or "-"), shown[0], shown[1], f"{row['rows_within']}, {row['rows']}"]
        )
    columns = ("trained on", "scored on", "method", "labels", "classes", "within", "across", "rows")
    title = f"{rows[0]['protocol']} across data sets: {measure}{'' if measure == 'mae' else ' in %'}, classes that both have"
    app.show(columns, cells, wide=2, title=title)


def _shown(score: dict, measure: str) -> str:
    """Return a mean with its interval, in % unless it is an error."""
    factor, digits = (1, 3) if measure == "mae" else (100, 1)
    shown = f"{factor * score['mean']:.{digits}f}"
    if score["interval"] is not None:
        shown += " [{}, {}]".format(*(f"{factor * x:.{digits}f}" for x in score["interval"]))
    return shown


def _table(methods: dict, rows: list[dict], comparisons: list[dict]) -> None:
    from conclugen_jax.study.definition import PROBE
    from conclugen_jax.study.results import not_ahead

    numbers = list(dict.fromkeys(row["labels_per_class"] for row in rows))
    measure = next(iter(rows[0]["scores"]))
    unit = "" if measure == "mae" else " in %"
    table = {row["method"]: [methods[row["method"]]["title"]] + ["-"] * len(numbers) for row in rows}
    for row in rows:
        table[row["method"]][1 + numbers.index(row["labels_per_class"])] = _shown(row["scores"][measure], measure)
    if rows[0]["protocol"] == PROBE:
        titles = {name: one["title"] for name, one in methods.items()}
        for method, cells in table.items():
            if remark := not_ahead(comparisons, rows[0]["dataset"], method, titles):
                cells[0] += f" ({remark})"
    title = f"{rows[0]['protocol']} on {rows[0]['dataset']}: {measure}{unit}, mean and 95 % interval"
    app.show(["method", *(f"{n} labels" if n else "all labels" for n in numbers)], table.values(), title=title)


def _warn(methods: dict, rows: list[dict]) -> None:
    """Name the classes that are never predicted on a data set by a protocol."""
    from conclugen_jax.evaluate import metrics

    missed = {}
    for row in rows:
        if row["never_predicted"]:
            what = f"{methods[row['method']]['title']}, {row['labels_per_class'] or 'all'} labels"
            missed[what] = row["never_predicted"], row["evaluations"]
    if missed:
        place = f"{rows[0]['protocol']} on {rows[0]['dataset']}"
        print(f"warning: {place}: {metrics.missed_sentence(missed)}", file=sys.stderr)
