"""The matrix of corpora: a row for each training data set, a column for each test data set."""

from collections.abc import Iterator

import msgspec

from conclugen_jax.study.report.reading import Study
from conclugen_jax.study.report.tables import (
    NAMES,
    NOTHING,
    Part,
    Table,
    first_score,
    measures_of,
    words,
    words_of_labels,
)


def parts(study: Study) -> Iterator[Part]:
    """Yield a matrix for each protocol, with the most labels that there are; then how classes were matched."""
    keys = [key for key in study.datasets if any(key in (one.dataset, one.test_data) for one in study.across)]
    shown = [one for one in study.across if one.labels == study.most_labels(one.dataset)]
    for protocol in dict.fromkeys(one.protocol for one in shown):
        own = {
            (s.method, s.dataset): s
            for s in study.summary
            if (s.protocol, s.labels) == (protocol, study.most_labels(s.dataset))
        }
        found = {(one.method, one.dataset, one.test_data): one for one in shown if one.protocol == protocol}
        rows = []
        for method, trained in dict.fromkeys(place[:2] for place in found):
            cells = [first_score(study, own[method, trained]) if key == trained else NOTHING for key in keys]
            for i, key in enumerate(keys):
                if one := found.get((method, trained, key)):
                    within = first_score(study, msgspec.structs.replace(one, scores=one.within))
                    cells[i] = (*first_score(study, one), f"within {within[0]}")
            rows.append(((study.label(method, protocol),), (study.datasets[trained].title(trained),), *cells))
        labels = " or ".join(dict.fromkeys(words_of_labels(study.most_labels(key)) for key in keys))
        measures = " or ".join(dict.fromkeys(NAMES[measures_of(study.datasets[key])[0]] for key in keys))
        note = (
            f"{measures} in % on test rows, {labels}: mean ± standard deviation over n seeds, [95 % interval]. Off the "
            "diagonal only rows of classes that both have count; within: the same of own test rows."
        )
        titles = [f"scored on {study.datasets[key].title(key)}" for key in keys]
        yield Part(protocol.replace("_", " "), table=Table(("method", "trained on", *titles), rows, note))
    pairs = {(one.dataset, one.test_data): one for one in study.across}
    matched = [
        (
            *pair,
            ", ".join(a if a == b else f"{a} = {b}" for a, b in one.classes.items()) or "–",
            ", ".join(one.only_trained) or "–",
            ", ".join(one.only_scored) or "–",
            f"{one.rows_within:,} and {one.rows:,}",
        )
        for pair, one in pairs.items()
    ]
    columns = ("trained on", "scored on", "classes of both", "only trained", "only scored", "test rows that count")
    yield words("Classes matched by name", columns, matched)
