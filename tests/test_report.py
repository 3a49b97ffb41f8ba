"""The report of a study: its numbers in HTML and Markdown, its figures, what is missing or damaged, and how it looks."""

import base64
import hashlib
import json
import re
import shutil
import sys

import numpy as np
import pytest

from conclugen_jax.commands import app
from conclugen_jax.data import builders, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import probe
from conclugen_jax.runs import checkpoint
from conclugen_jax.study.report import (
    embedding_map as report_map,
    figures as report_figures,
    reading as report_study,
    report,
    walk,
)
from tests.browser import CHROMIUM, Browser
from tests.helpers import Faces, run
from tests.reports import Page, make_study, score, summary, unpacked


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Faces((64, 24, 24), missing=0.3), tmp_path_factory.mktemp("report") / "data")


@pytest.fixture(scope="module")
def study(tmp_path_factory, data):
    return make_study(tmp_path_factory.mktemp("report") / "study", data)


@pytest.fixture(scope="module")
def written(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "out"
    return report.write(study, folder, maps=["conclugen", "generative"]), folder


@pytest.fixture(scope="module")
def page(written):
    return Page((written[1] / "report.html").read_text())


@pytest.fixture(scope="module")
def markdown(written):
    return (written[1] / "report.md").read_text()


def changed(study, tmp_path, change):
    """A copy of the study whose results are changed."""
    folder = shutil.copytree(study, tmp_path / "changed")
    tree = json.loads((folder / "results.json").read_text())
    change(tree)
    (folder / "results.json").write_text(json.dumps(tree))
    return folder


def test_scores_stand_beside_the_published_ones(page, markdown):
    ours = ["57.1 ± 0.3", "[56.3, 58.0]", "paper 56.6 (+0.5)"]
    table = next(t for t in page.tables if t[0][1] == ["Acc"] and t != ["56.6"] and any(ours in r for r in t))
    row = next(r for r in table if r[0] == ["ConCluGen"])
    assert row[1:] == [ours, ["53.1", "paper 53.1 (±0.0)"], ["–"], ["–"], ["3"]]
    vision = next(r for r in table if r[0] == ["ConCluGen/(vision)"])
    assert vision[1] == ["30.0", "paper 31.0 (−1.0)"]
    assert (
        "| ConCluGen | 57.1 ± 0.3 · \\[56.3, 58.0\\] · paper 56.6 (+0.5) | 53.1 · paper 53.1 (±0.0) | – | – | 3 |"
        in markdown
    )
    # the sentiment of the same corpus has no published numbers
    assert "| ConCluGen | 80.0 | – | – | 0.700 | 0.654 | 1 |" in markdown


def test_protocols_stand_beside_the_published_ones(page):
    table = next(t for t in page.tables if t[0][:2] == [["method"], ["faces 1.0.0"]])
    assert table[0][1:] == [
        ["faces 1.0.0"],
        ["meld 1.0.0"],
        ["mosei (cmu_mosei 1.0.0)"],
        ["sentiment (cmu_mosei 1.0.0)"],
    ]
    by_name = {row[0][0]: row[1:] for row in table[1:]}
    assert by_name["supervised baseline"] == [["–"], ["55.0", "n = 1", "paper 55.97 (−1.0)"], ["–"], ["–"]]
    assert by_name["ConCluGen, linear evaluation"][1][-1] == "paper 56.6 (+0.5)"
    assert by_name["ConCluGen, linear evaluation"][2][-1] == "paper 60.0 (+1.0)"
    assert by_name["ConCluGen, fine-tuned"][1] == ["60.0", "n = 3", "paper 60.03 (−0.0)"]


def test_the_first_sentence_says_how_far_with_its_interval(study, tmp_path):
    for difference, said in ((0.031, "3.1 points above"), (-0.031, "3.1 points below"), (0.0001, "as much as")):
        ends = [difference - 0.02, difference + 0.01]

        def change(tree, difference=difference, ends=ends):
            tree["definition"]["reference"] = "conclugen"
            tree["methods"]["best_baseline"] = {"title": "the best baseline", "pretraining": None}
            tree["summary"].append(summary("faces", "conclugen", "probe", 5, 3, accuracy=score(0.63, 0.01, 0.6, 0.66)))
            about = {"dataset": "faces", "method": "conclugen", "protocol": "probe", "labels_per_class": 5, "n": 3}
            best = {"baseline": "best_baseline", "best": "raw_features", "measure": "accuracy"}
            tree["comparisons"].append(about | best | {"difference": difference, "interval": ends})

        report.write(changed(study, tmp_path / said, change), tmp_path / said / "out", maps=[])
        first = Page((tmp_path / said / "out/report.html").read_text()).sections[""]
        low, high = (-100 * x for x in reversed(ends)) if difference < 0 else (100 * x for x in ends)
        reached = "with 5 labels a class ConCluGen reaches 63.0 % [60.0, 66.0]"
        told = f"{reached}, {said} raw features [{low:.1f}, {high:.1f}], 3 seeds."
        assert told in first


def test_comparisons_of_three_seeds_are_marked_where_zero_is_excluded(page, markdown):
    table = next(t for t in page.tables if t[0][0] == ["difference"])
    assert [row[0] for row in table[1:]] == [
        ["ConCluGen", f"minus {b}"] for b in ("Generative", "raw features", "supervised baseline", "ConCluGen/(vision)")
    ]
    assert [row[1] for row in table[1:]] == [
        ["+3.1 ✱", "[+1.0, +5.2], n = 3"],
        ["−2.0", "[−4.9, +0.8], n = 3"],
        ["+1.0", "n = 1"],
        ["−3.0", "[−5.0, −1.0], n = 2"],  # of two seeds
    ]
    assert "✱: the 95 % interval, over 3 seeds or more, excludes zero." in markdown


def test_intervals_of_an_earlier_version_are_cut(study, tmp_path):
    def change(tree):
        tree["summary"][2]["scores"]["accuracy"]["interval"] = [0.7, 1.1]

    report.write(changed(study, tmp_path, change), tmp_path / "out", maps=[])
    text = (tmp_path / "out/report.md").read_text()
    assert "90.0 ± 1.0 · \\[70.0, 100.0\\]" in text
    assert "110.0" not in text


def test_what_runs_say_and_classes_never_predicted(study, tmp_path):
    def change(tree):
        tree["warnings"] = ["faces: the folds are cut over examples"]
        tree["summary"][0] |= {"never_predicted": {"sad": 2, "angry": 4}, "evaluations": 4}
        tree["summary"][1] |= {"never_predicted": {}, "evaluations": 4}

    written = report.write(changed(study, tmp_path, change), tmp_path / "out", maps=[])
    assert "faces: the folds are cut over examples." in written.warnings
    text = (tmp_path / "out/report.md").read_text()
    said = (
        "Never predicted on the test split: ConCluGen, 2 labels per class: 'sad' (2 of 4 evaluations), 'angry' (4 of 4"
    )
    assert text.count(said) == 1
    assert text.count("Never predicted") == 1
    assert said in Page((tmp_path / "out/report.html").read_text()).sections["results"]


def test_label_efficiency(page):
    table = next(t for t in page.tables if t[0][1] == ["2 labels"] and t[0][0] == ["method"])
    assert table[0] == [["method"], ["2 labels"], ["20 labels"], ["all labels"]]
    assert table[1][1] == ["50.0 ± 1.0", "[41.0, 59.0], n = 2"]
    assert table[3] == [["ConCluGen, fine-tuned"], ["60.0 ± 1.0", "[51.0, 69.0], n = 2"], ["–"], ["–"]]
    hints = page.figures["Accuracy against labels per class, faces 1.0.0"]
    assert "ConCluGen: 75 [66, 84]" in hints
    assert "Generative: 80" in hints
    assert [h for h in hints if h.strip() in ("2", "20", "all")] == ["2", "20", "all"]
    assert report_figures.positions({0, 20, 2, 5}) == pytest.approx(
        {2: 1, 5: np.log2(5), 20: np.log2(20), 0: np.log2(20) + np.log2(10) / 2}
    )
    assert report_figures.positions({0}) == {0: 1.0}


def test_lines_of_one_point_stand_in_the_table_alone(study, tmp_path):
    def thin(tree):
        tree["summary"] = [
            summary("faces", "conclugen", "linear_evaluation", 2, 1, accuracy=score(0.5)),
            summary("faces", "generative", "linear_evaluation", 0, 1, accuracy=score(0.6)),
        ]

    folder = changed(study, tmp_path, thin)
    report.write(folder, maps=[])
    page = Page((folder / "report.html").read_text())
    assert not [figure for figure in page.figures if figure.startswith("Accuracy against labels")]
    assert [["method"], ["2 labels"], ["all labels"]] in [table[0] for table in page.tables]


def test_confusion_matrices_are_summed_and_normalised(page):
    cells = {a["title"]: a for tag, a in page.tags if tag == "td" and "title" in a}
    assert "true neutral, predicted surprise: 2 of 4 (50.0 %)" in cells
    whole = cells["true anger, predicted anger: 14 of 14 (100.0 %)"]
    assert whole["style"] == "--share: 1.000"
    assert "true yes, predicted yes: 75 of 100 (75.0 %)" in cells
    assert "true no, predicted yes: 10 of 100 (10.0 %)" in cells
    assert "true happy, predicted happy: 0 of 0 (0.0 %)" in cells
    assert (
        "sentiment (cmu_mosei 1.0.0): numbers for labels, so no confusion matrix."
        in page.sections["confusion-matrices"]
    )
    captions = [tag for tag, _ in page.tags if tag == "caption"]
    assert len(captions) == 6  # a matrix for each label of mosei


def test_pretraining_and_probes(page):
    text = page.sections["pretraining"]
    for heading in (
        "Clustering term (L_Clu)",
        "Reconstruction term (L_Rec)",
        "k-means iterations per step",
        "NMI of clusters",
    ):
        assert heading in text
    assert "Instance term" not in text
    assert "Protocol: k = 5, cosine" in text
    assert "number 1 by size: 59.4 % at the end" in page.figures["Cluster sizes of ConCluGen"]
    hints = page.figures["NMI of clusters and labels"]
    assert any("step 8: 0.2" in h for h in hints)
    assert not any("Generative" in h for h in hints)


def test_map_shows_the_clusters_of_the_run(study, data, page):
    run_, dataset = report_study.read(study).runs["conclugen"][0], shards.open_dataset(data)
    found, there = report_map.sample(run_, walk.draw(dataset, list(dataset.manifest.modalities)))
    assert there.all()
    rows = probe.represent_rows(run_.workdir, found, dataset.manifest.label.names)
    model, variables, _ = probe.load(run_.workdir)
    logits = model.clone(axis_name=None).apply(variables, rows.features).cluster_logits
    fused = np.stack([np.mean([logits[m][i] for m in rows.features if rows.present[m][i]], axis=0) for i in range(112)])
    with checkpoint.Checkpoints(run_.workdir, read_only=True) as saved:
        centroids = saved.restore_tree(12)[0]["centroids"]
    lengths = np.maximum(np.linalg.norm(centroids, axis=1), 1e-12)
    np.testing.assert_array_equal(rows.clusters, (fused @ (centroids / lengths[:, None]).T).argmax(axis=1))
    captions = page.sections["maps"]
    shown = json.loads(page.scripts[0])
    assert [space["name"] for space in shown["spaces"]] == [
        "ConCluGen",
        "Generative",
        "raw features: video, audio, text",
    ]
    clusters = shown["spaces"][0]["clusters"]
    named = np.array(clusters["names"])[unpacked(clusters["of"])]
    assert named.tolist() == [f"cluster {k:02d}" for k in rows.clusters]
    assert "Generative has no clusters" in captions
    assert "meld 1.0.0: no map, there is no data set in /nowhere any more." in captions
    points = [h for h in page.figures["Map of ConCluGen"] if h.endswith("points")]
    assert sum(int(re.search(r"(\d+) points", h)[1]) for h in points) == 112


def test_failed_and_missing_are_named(page, markdown, written):
    assert written[0].progress == "10 of 12 runs done, 1 failed, 1 missing."
    row = page.row("fine_tuning/meld/generative/seed_0/labels_0")
    assert row[1] == ["failed"]
    assert row[2][0].startswith("step 3: </td><script>")
    assert page.row("fine_tuning/meld/generative/seed_1/labels_0")[1:] == [["missing"], ["not run yet"]]
    assert "| failed | step 3: \\<" in markdown


def test_what_files_say_is_no_markup(page, written, markdown):
    assert {tag for tag, _ in page.tags}.isdisjoint({"img", "a b"})
    assert [a for tag, a in page.tags if tag == "script"] == [{"type": "application/json"}, {}]
    assert page.scripts[1] == report.SCRIPT
    assert page.sections["configuration-and-versions"].count("<script>alert(1)") == 1
    text = (written[1] / "report.html").read_text()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    row = next(line for line in markdown.splitlines() if "step 3" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 4
    assert not re.search(r"(?<!\\)[<`*_\[]", row.split("step 3")[1])


def test_nothing_is_loaded_from_elsewhere(page, written):
    text = (written[1] / "report.html").read_text()
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "base", "image", "metadata")
        assert not {"src", "srcset", "xlink:href"} & set(attributes)
        assert "(" not in attributes.get("style", "").replace("var(--", "")
        assert attributes.get("clip-path", "url(#").startswith("url(#")
        assert attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src file:; script-src 'sha256-"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": f"{policy}{digest}'"}) in page.tags
    assert [tag for tag, _ in page.tags].count("style") == 1  # none of a figure, which would be the page's
    assert {a["href"][1:] for tag, a in page.tags if tag == "a"} == set(page.sections) - {""}
    targets = {a["id"] for _, a in page.tags if "id" in a}
    used = {a["href"][1:] for _, a in page.tags if "href" in a} | {a.get("aria-describedby") for _, a in page.tags} - {
        None
    }
    assert used | {a["clip-path"][5:-1] for _, a in page.tags if "clip-path" in a} == targets


def test_results_alone_make_a_report(study, tmp_path):
    (tmp_path / "results.json").write_text((study / "results.json").read_text())
    report.write(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "There is no pretraining run" in page.sections["pretraining"]
    assert "No pretraining run has a checkpoint" in page.sections["maps"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.md", "results.json"]


def test_a_study_without_any_score_makes_a_report(study, tmp_path):
    def forget(tree):
        tree.update(summary=[], comparisons=[])
        for each in tree["cells"]:
            each.update(status="missing", scores=None, confusion_matrix=None)

    folder = changed(study, tmp_path, forget)
    shutil.rmtree(folder / "pretraining/conclugen/seed_0/checkpoints")
    (folder / "pretraining/conclugen/seed_0/probes.jsonl").unlink()
    (folder / "pretraining/generative/seed_0/metrics.jsonl").unlink()
    (folder / "pretraining/generative/seed_1").mkdir()
    written = report.write(folder)
    page = Page((folder / "report.html").read_text())
    assert written.progress == "0 of 12 runs done, 12 missing."
    for section, sentence in {
        "results": "No run of this study has scores yet.",
        "paired-comparisons": "There is nothing to compare",
        "label-efficiency": "one number of labels",
        "confusion-matrices": "numbers for labels",
        "pretraining": "No probes ran",
        "maps": "Generative, by class",
    }.items():
        assert sentence in page.sections[section], section


def test_data_sets_that_could_not_be_read_are_named(study, tmp_path):
    gone = {"path": "/gone", "error": "/gone: no such file"}
    folder = changed(study, tmp_path, lambda tree: tree["datasets"].update(meld=gone))
    assert report.write(folder, maps=[]).warnings == [
        "Data set meld could not be read when the results were collected: /gone: no such file."
    ]
    page = Page((folder / "report.html").read_text())
    assert "meld" in page.sections["results"]
    assert "on meld" not in " ".join(page.figures)


def test_other_data_are_named(study, tmp_path):
    folder = changed(study, tmp_path, lambda tree: tree["datasets"]["faces"].update(sha256="f" * 64))
    warnings = report.write(folder, maps=[]).warnings
    assert [w.split(" was ")[0] for w in warnings[1:]] == [
        f"pretraining/{m}/seed_0" for m in ("conclugen", "generative")
    ]
    assert all("ffffffffffff" in w for w in warnings)
    assert warnings[0].startswith("Data set faces in ")
    assert (folder / "report.html").read_text().count("Beware.") == 3
    assert (folder / "report.md").read_text().count("Beware.") == 3


def test_damaged_files_are_named(study, tmp_path):
    folder = shutil.copytree(study, tmp_path / "study")
    log = folder / "pretraining/conclugen/seed_0/metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([lines[0], '{"loss": 3}\n', *lines[2:]]))
    with pytest.raises(ConclugenError, match=r"metrics\.jsonl, line 2: not a JSON object with a step"):
        report.write(folder)
    log.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ConclugenError, match=r"metrics\.jsonl, line 1: not a JSON object"):
        report.write(folder)
    log.write_text("".join(lines))
    (folder / "pretraining/conclugen/seed_0/data.json").write_text("{}")
    with pytest.raises(ConclugenError, match=r"data\.json: damaged manifest"):
        report.write(folder)
    (folder / "results.json").write_text("[" * 100_000)
    with pytest.raises(ConclugenError, match=r"results\.json: not valid JSON"):
        report.write(folder)
    with pytest.raises(ConclugenError, match="no method 'conclu'"):
        report.write(study, tmp_path / "new", maps=["conclu"])
    assert not (tmp_path / "new").exists()


def test_damaged_checkpoint_is_named(study, tmp_path):
    folder = shutil.copytree(study, tmp_path / "study")
    for file in (folder / "pretraining/conclugen/seed_0/checkpoints/12").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(ConclugenError, match=r"conclugen/seed_0/checkpoints/12: the checkpoint is damaged"):
        report.write(folder)
    assert not (folder / "report.html").exists()


def test_the_same_results_make_the_same_page(written, study):
    pages = [report.write(study, written[1], maps=["conclugen", "generative"]).files[0].read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]
    assert len(pages[0]) < 1_000_000


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_an_optional_package_one_sentence_says_what_to_install(study, tmp_path, monkeypatch, capfd, package):
    for name in ("pages", "report", "figures", "charts"):
        monkeypatch.delitem(sys.modules, f"conclugen_jax.study.report.{name}", raising=False)
        monkeypatch.delattr(f"conclugen_jax.study.report.{name}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert app.call("report", [f"--study={study}", f"--output={tmp_path / 'out'}"]) == 2
    assert f"needs {package}, which is not installed; pip install 'conclugen_jax[report]'" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command(study, tmp_path):
    result = run("launch.report", f"--study={study}", f"--output={tmp_path}/out", "--maps=")
    assert "10 of 12 runs done" in result.stdout
    assert (tmp_path / "out/report.html").exists()
    assert (
        "no study, run or search is there; name its folder"
        in run("launch.report", f"--study={tmp_path}", code=2).stderr
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to look at the page with")
def test_in_a_browser(written, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        for width in (1280, 390, 320):
            for dark in (False, True):
                browser.open(written[1] / "report.html", width=width, dark=dark)
                if width == 390:
                    assert browser.violations() == []
                wide = "[document.documentElement.scrollWidth, innerWidth]"
                assert browser.run(wide) == [width, width]
                hidden = "document.documentElement.classList.remove('js')"  # maps as without scripts
                browser.run(hidden)
                sizes = browser.run("[...document.querySelectorAll('svg')].map(s => [s.clientWidth, s.clientHeight])")
                assert len(sizes) > 12
                assert all(w >= 20 and h >= 10 for w, h in sizes)
                # text of figures does not shrink on a phone, and stays within its figure
                scale = "Math.min(...[...document.querySelectorAll('svg.figure')].map(s => s.clientWidth / 360))"
                assert browser.run(scale) > (0.75 if width == 320 else 0.95)
                outside = (
                    "[...document.querySelectorAll('svg.figure text')].filter(t => {"
                    "const b = t.getBoundingClientRect(), s = t.ownerSVGElement.getBoundingClientRect();"
                    "return b.left < s.left - 1 || b.right > s.right + 1 || b.top < s.top - 1 || b.bottom > s.bottom + 1"
                    "}).map(t => t.textContent)"
                )
                assert browser.run(outside) == []
                assert browser.run("getComputedStyle(document.body).backgroundColor") == (
                    "rgb(18, 22, 27)" if dark else "rgb(255, 255, 255)"
                )
        dark = [{"name": "prefers-color-scheme", "value": "dark"}]
        browser.call("Emulation.setEmulatedMedia", media="print", features=dark)
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        browser.paper(tmp_path / "report.pdf")
        assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
        assert browser.problems == []
