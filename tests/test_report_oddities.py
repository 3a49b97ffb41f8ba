"""The section of a report on what is odd in its data: the same as the command says, and sentences where it cannot be said."""

import pytest

from conclugen_jax.data import builders
from conclugen_jax.evaluate import odd_tables, oddities
from conclugen_jax.study.report import oddities as section, reading, report
from tests.helpers import Faces
from tests.reports import Page, make_study
from tests.test_oddities import Strange


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Strange((64, 24, 24), missing=0.3), tmp_path_factory.mktemp("odd") / "data")


@pytest.fixture(scope="module")
def study(tmp_path_factory, data):
    return make_study(tmp_path_factory.mktemp("odd") / "study", data)


def test_it_is_what_the_command_finds(study, data):
    found = {}
    for part in section.parts(reading.read(study)):
        found.setdefault(part.heading, part)
    runs = [str(study / "pretraining" / name / "seed_0") for name in ("conclugen", "generative")]
    own = oddities.find(data, runs)
    for one in odd_tables.shown(own, section.TOP):
        assert found[one.title].text == one.said
        if one.rows:
            assert found[one.title].table.columns == tuple(one.columns)
            assert [[cell for (cell,) in row] for row in found[one.title].table.rows] == [list(row) for row in one.rows]
    assert list(own.wrong["accuracy"])[:2] == ["conclugen/seed_0", "generative/seed_0"]
    assert f"conclugen oddities --data={data} --workdir={','.join(runs)}" in found["faces 1.0.0"].notes[-1]
    assert found["meld 1.0.0"].notes == ["Not looked for: there is no data set in /nowhere any more."]


def test_the_page_has_it(study, tmp_path):
    report.write(study, tmp_path, maps=[])
    page = Page((tmp_path / "report.html").read_text())
    text = page.sections["oddities"]
    for said in (
        "Likely wrong labels",
        "Near duplicates",
        "Persons as clusters",
        "What modalities add",
        "Wrong by every",
    ):
        assert said in text
    assert page.row("train3")[1] == ["test0"]
    assert "| train3 | test0 | copy |" in (tmp_path / "report.md").read_text()


def test_runs_on_other_features_are_left_out(study, tmp_path):
    narrow = Faces((20, 6, 6))
    narrow.spec = narrow.spec.__class__(**{**vars(narrow.spec), "modalities": {"video": 24}})
    narrow.examples = lambda split: (
        e.__class__(**{**vars(e), "features": {"video": e.features["video"]}})
        for e in Faces.examples(Faces((20, 6, 6)), split)
    )
    found = reading.read(study)
    found.datasets = {"narrow": found.datasets["faces"]}
    found.datasets["narrow"].path = str(builders.build(narrow, tmp_path))
    parts = list(section.parts(found))
    assert any("need several methods" in note for note in parts[0].notes)
    assert "--workdir" not in parts[0].notes[-1]
