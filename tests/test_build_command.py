"""Building as a user types it: processes, progress, a further modality that is then trained on, refusals."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from conclugen_jax.data import builders, formats, manifest as manifest_lib
from conclugen_jax.data.requests import Request
from tests.helpers import ROOT, run, start
from tests.layouts import build, save, table_rows, write_csv
from tests.test_commands import TINY


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A table of four modalities, one of them elsewhere, half of the text missing."""
    folder = tmp_path_factory.mktemp("source")
    rows, stored = table_rows(96)
    (folder / "t").mkdir()
    write_csv(folder / "t" / "labels.csv", rows)
    for modality, x in stored.items():
        ids = [i for i in x if modality != "text" or int(i[4:]) % 2]
        np.save(folder / "t" / f"{modality}.npy", np.stack([x[i] for i in ids]))
        (folder / "t" / f"{modality}.txt").write_text("\n".join(ids))
    for row in rows:
        save(folder / "landmarks" / f"{row['id']}.npy", np.arange(6) + len(row["id"]))
    return folder


def command(source, data_dir, *more):
    return [
        "build",
        "--dataset=features",
        "--name=mine",
        f"--source={source}/t",
        "--modality",
        f"landmarks={source}/landmarks",
        "--label=emotion",
        "--targets=arousal",
        f"--data_dir={data_dir}",
        *more,
    ]


def test_a_further_modality_enters_all_pairs(source, tmp_path):
    result = run(*command(source, tmp_path / "data", "--num_workers=2"))
    folder = tmp_path / "data/mine/1.0.0"
    assert result.stdout.splitlines()[0] == (
        f"{folder}: train 32, validation 32, test 32 examples; modalities audio 3, text 4, video 5, landmarks 6; 3 classes"
    )
    assert re.search(r"text is missing in train \d+, validation \d+, test \d+", result.stdout)
    assert "96 int64 vectors of landmarks were converted to float32" in result.stdout
    label = "emotion: 3 classes (angry, happy, sad), since its cells are words; use --label_kind or --classes to change that"
    target = "arousal: a number to predict, since its cells are numbers such as "
    assert [result.stdout.count(f"\n{line}") for line in (label, target)] == [1, 1]
    assert run(*command(source, tmp_path / "data")).stdout == result.stdout
    config = tmp_path / "four.py"
    config.write_text(
        TINY.replace(
            "tiny_config()",
            f"tiny_config({str(folder)!r}, data__modalities=('video', 'audio', 'text', 'landmarks'), "
            "model__bottleneck=(), train__batch_size=8, train__num_epochs=2, clustering__start_epoch=0, "
            "loss__reconstruction_weight=0.0)",
        )
    )
    run("pretrain", f"--config={config}", f"--workdir={tmp_path}/run")
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(log) == 8
    assert all(np.isfinite(record["loss"]) for record in log)
    assert "kmeans/iterations" in log[-1]


MISTAKES = {
    "strict": (["--strict"], r"groups? in common"),
    "no name": (["--name="], r"needs a name of its own; give it with --name"),
    "modality": (["--modality", "smell"], r"--modality=smell: expected NAME=PATH"),
    "pool": (["--pool=sum"], r"'sum' is unknown; there are mean, max, last"),
    "format": (["--format=csv"], r"format 'csv' is unknown; there are auto, authors"),
    "label": (["--label=mood"], r"labels.csv: no column 'mood'; it has id, split"),
    "kind": (["--label_kind=double"], r"label_kind"),
    "number": (["--num_workers=two"], r"num_workers"),
    "folds": (["--num_folds=5"], r"have splits \(train, validation, test\) already"),
    "beam": (["--beam"], r"pip install 'conclugen_jax\[beam\]'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_sentence(source, tmp_path, name):
    more, message = MISTAKES[name]
    if name == "strict":
        rows, _ = table_rows(96)
        write_csv(tmp_path / "labels.csv", [{**row, "group": "one"} for row in rows])
        more = [*more, f"--labels={tmp_path}/labels.csv"]
    flag = more[0].partition("=")[0]
    others = [argument for argument in command(source, tmp_path / "data") if not argument.startswith(f"{flag}=")]
    assert re.search(message, run(*others, *more, code=2).stderr)
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


IGNORED = {
    "--dataset=digits --name=mine": "--name is for features in files",
    "--dataset=digits --num_folds=3": "--num_folds is for features in files",
    "--dataset=digits --source=.": "--source is for features in files",
    "--dataset=features --fold=0": "--fold=0 without --num_folds",
    "--dataset=features --label=a,b --label_kind=value": "--label_kind=value is for one column, --label names 2",
    "--dataset=features --label=a,b --classes=x,y": "--classes names the classes of one column",
    "--dataset=features --label=a --label_kind=value --classes=x,y": "--classes names the classes of one column",
    "--dataset=features --beam_options=--runner=DirectRunner": "--beam_options without --beam",
    "--dataset=features --beam --num_workers=2": "--num_workers with --beam",
    "--dataset=features --name=m --modality v=SOURCE/t/video.npy --format=npz": "'npz' is read from a source",
    "--dataset=features --name=m --modality v=SOURCE/t/video.npy --version=01.0.0": "without leading zeros",
    "--dataset=digits --format=auto": "--data_dir is missing",
}


def test_flags_that_would_do_nothing_are_refused(source):
    for line, expected in IGNORED.items():
        arguments = line.replace("SOURCE", str(source)).split()
        result = run("build", *arguments, *["--data_dir=/dev/null/x"] * ("m " in line), code=2)
        assert expected in result.stderr, line


@pytest.mark.slow
def test_any_encoding_of_the_terminal_and_of_the_source(tmp_path):
    """Names that the terminal's encoding, or any, cannot hold are printed by their numbers."""
    folder = tmp_path / os.fsdecode(b"clips\xff")
    folder.mkdir()
    np.save(folder / "video.npy", np.ones((4, 3), np.float32))
    (folder / "video.txt").write_text("a\nb\nc\nd")
    write_csv(
        folder / "labels.csv",
        [{"id": i, "split": s, "group": "Zoë"} for i, s in zip("abcd", ["train", "test"] * 2, strict=True)],
    )
    command = [
        "build",
        "--dataset=features",
        "--name=x",
        f"--source={folder}",
        f"--data_dir={tmp_path}/data",
    ]
    request = Request("features", folder, name="x")
    path = builders.build(formats.open_source(request), tmp_path / "data") / manifest_lib.FILE
    tree = json.loads(path.read_text())
    del tree["source"]["converted"]  # which is told where it is there
    tree["source"] |= {"rows_outside_folds": 2, "replaced": {"video": 1234}}
    path.write_text(json.dumps(tree))
    result = start(*command, env={"PYTHONIOENCODING": "ascii"})
    assert (
        "1,234 values of video were -inf and read as 0\n2 rows of the labels are of videos in no fold" in result.stdout
    )
    assert "have 1 group in common, such as 'Zo\\xeb'" in result.stdout
    shown = start("inspect", f"--data={tmp_path}/data/x/1.0.0", env={"PYTHONIOENCODING": "ascii"}).stdout
    assert "Zo\\xeb" in shown


def test_modalities_alone_are_a_data_set_without_labels(tmp_path):
    for modality, ids in {"video": "abc", "audio": "bcd"}.items():
        np.save(tmp_path / f"{modality}.npy", np.ones((3, 3), np.float32))
        (tmp_path / f"{modality}.txt").write_text("\n".join(ids))
    named = {m: str(tmp_path / f"{m}.npy") for m in ("video", "audio")}
    _, found = build(Request("features", name="named", modalities=named), tmp_path / "data")
    assert {i: set(features) for i, (features, _, _) in found["train"].items()} == {
        "a": {"video"},
        "b": {"video", "audio"},
        "c": {"video", "audio"},
        "d": {"audio"},
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(source, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert f"{tmp_path}/closed" in run(*command(source, tmp_path / "closed/data"), code=2).stderr


@pytest.mark.slow
def test_full_disk_while_workers_write(source, tmp_path):
    full = ["bash", "-c", 'trap "" XFSZ; ulimit -f 1; exec "$@"', "full"]
    result = start(*command(source, tmp_path / "data", "--num_workers=2"), code=2, prefix=full)
    assert "cannot write the data set" in result.stderr
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.slow
def test_sigterm_leaves_nothing(tmp_path):
    """The scratch folder goes on the way out, not only at the next build."""
    code = (
        "import sys, time, signal, os, threading\n"
        "from conclugen_jax.commands import app\n"
        "from conclugen_jax.data import digits\n"
        "from tests.helpers import Faces\n"
        "class Slow(Faces):\n"
        "    def examples(self, split):\n"
        "        for e in super().examples(split):\n"
        "            print('row', flush=True); time.sleep(0.2); yield e\n"
        "digits.Digits = Slow\n"
        "app.run('build', sys.argv[1:])\n"
    )
    arguments = ["--dataset=digits", f"--data_dir={tmp_path}"]
    build = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, cwd=ROOT)
    build.stdout.readline()
    assert len(list(tmp_path.iterdir())) == 2  # scratch folder and lock
    build.terminate()
    build.stdout.close()
    assert build.wait(30) == 143
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_example_of_the_documentation(tmp_path):
    """docs/reference/datasets/features.md: its program, then its command."""
    text = (ROOT / "docs/reference/datasets/features.md").read_text()
    program = text.split("```python\n")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    line = text.split("```\nconclugen ")[1].split("\n")[0]
    name, *flags = line.split()
    flags = [flag.replace("=mine", f"={tmp_path}/mine") if "--source" in flag else flag for flag in flags]
    flags = [f"--data_dir={tmp_path}/data" if "--data_dir" in flag else flag for flag in flags]
    result = run(name, *flags)
    manifest = manifest_lib.read(tmp_path / "data/mine/1.0.0")
    assert {s: f["num_examples"] for s, f in manifest.splits.items()} == {"train": 34, "validation": 33, "test": 33}
    assert manifest.modalities == {"audio": 128, "video": 512}
    assert "warning: splits 'train' and 'validation'" not in result.stdout  # speaker i % 9 follows split i % 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--classes=h,s,h"], "--classes: 'h' is there twice; name it once"),
        (["--modalities=video,video"], "--modalities: 'video' is there twice; name it once"),
        (["--targets=arousal,arousal"], "--targets: 'arousal' is there twice; name it once"),
        (["--modality=x=a.npy", "--modality=x=b.npy"], "--modality=x=... is there twice; give each modality one path"),
        (["--modality=x={0}/t/video.npy:foo"], "{0}/t/video.npy:foo: {0}/t/video.npy has no part 'foo'; name it alone"),
        (["--modality=x={0}/landmarks:foo"], "{0}/landmarks:foo: {0}/landmarks has no part 'foo'; name it alone"),
        (["--name=" + "n" * 245], "cannot write the data set (File name too long); choose a shorter --name or choose"),
    ],
)  # fmt: skip
def test_what_is_there_twice_or_would_be_ignored(source, tmp_path, given, message):
    given = [text.format(source) for text in given]
    said = run(
        "build", "--dataset=features", "--name=mine", f"--source={source}/t", f"--data_dir={tmp_path}/d", *given, code=2
    )
    assert message.format(source) in said.stderr
    assert not list(tmp_path.glob("d/*/*"))
