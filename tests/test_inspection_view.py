"""Reports of inspections: their text, and the command."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conclugen_jax.data import builders, digits, inspection
from conclugen_jax.data.sources import LabelSpec
from tests.helpers import Faces, run
from tests.test_inspection import TEST, TRAIN, Odd, text
from tests.test_inspection_faults import flip

ROOT = Path(__file__).parent.parent


def launch(*arguments, code=0):
    return run("inspect", *arguments, code=code)


PRINTED = {"digits": digits.Digits(), **{kind: Odd(kind) for kind in ("multi", "single", "value", "none")}}


@pytest.mark.parametrize("source", PRINTED.values(), ids=PRINTED)
def test_text_fits_80_columns_and_takes_nothing_for_markup(tmp_path, source):
    report = inspection.inspect(builders.build(source, tmp_path))
    printed = text(report)
    assert max(map(len, printed.splitlines())) <= 80
    assert not [line for line in printed.splitlines() if "…" in line]
    assert printed.startswith(f"{source.spec.name} 1.0.0\n  ")
    if source.spec.name == "odd":
        assert "[/bold] with :smile: twice" in printed
        assert "train[7]" in printed
        assert ("[bold]sad[/bold]" in printed) == (source.spec.label.kind == "multi")
        assert "train2=train9, train20=train21" in printed
        assert "  video+audio+text   22  73.3%     8  72.7%   5  62.5%\n" in printed
        assert "- text, train: 10 columns constant (2, 3, 4, 5, 6, 7, 8, 9, ...)" in printed
        assert "all splits: 49 examples, not the 13,302 expected of the corpus" in printed
        assert "by design" in printed
        assert "  video         5          3          -            -   1  12.5%\n" in printed
        assert "have 1 group in common, such as '[p5]'" in printed
    else:
        assert "- every value is finite; no vector is zero throughout, no column constant" in printed
        assert "- no group is in two splits" in printed


def test_text_of_many_splits_and_long_names(tmp_path):
    class Many(Faces):
        def __init__(self):
            super().__init__((4, 4, 4))
            splits = tuple(f"a_split_with_a_long_name_{i}" for i in range(7))
            label = LabelSpec("single", tuple(f"class {c} of a name that goes on and on and on" for c in range(4)))
            self.spec = dataclasses.replace(self.spec, splits=splits, label=label, licence="w" * 200)
            self._num = dict.fromkeys(splits, 4)

    printed = text(inspection.inspect(builders.build(Many(), tmp_path)))
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed


def test_command(odd_folder, odd_copy):
    report = inspection.inspect(odd_folder, verify=True, top=1)
    result = launch(f"--data={odd_folder}", "--verify", "--json", "--top=1")
    assert json.loads(result.stdout) == report
    assert result.stderr == ""
    printed = launch(f"--data={odd_folder}").stdout
    assert printed == text(inspection.inspect(odd_folder))
    assert "faults" not in printed
    flip(odd_copy / TRAIN, 2500)
    (odd_copy / TEST).unlink()
    result = launch(f"--data={odd_copy}", "--verify", "--json", code=2)
    assert json.loads(result.stdout) == inspection.inspect(odd_copy, verify=True)
    assert "4 faults in 2 files; restore the data set from a copy" in result.stderr
    result = launch(f"--data={odd_copy}", "--verify", code=2)
    assert f"- {TEST}: the file is missing" in result.stdout
    assert "3 records" not in launch(f"--data={odd_copy}", code=2).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data is missing"),
        (["--data=/nowhere"], "/nowhere/manifest.json: cannot be read (No such file or directory); name the folder"),
        (["--data=/nowhere", "--top=-1"], "top"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message):
    assert message in launch(*arguments, code=2).stderr


def test_help():
    assert "conclugen inspect --data=" in launch("--help").stdout


def test_names_that_the_terminal_lacks(tmp_path):
    class Accents(Faces):
        def examples(self, split):
            yield from (dataclasses.replace(e, group="Zoë") for e in super().examples(split))

    folder = builders.build(Accents(), tmp_path)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "launch.inspect_dataset", f"--data={folder}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert rb"Zo\xeb" in result.stdout


def test_what_an_extraction_says_of_itself_is_set_in(odd_folder):
    report = inspection.inspect(odd_folder)
    backbones = {"resnet18": {"modality": "video", "sha256": "ab" * 32, "source": {"a.pth": "cd" * 32}, "options": {}}}
    report["source"] = {
        "dataset": "mine",
        "extraction": {"backbones": backbones, "failed": 2, "speech": {}, "notes": ""},
    }
    shown = text(report).partition("Origin\n")[2]
    assert shown.startswith(
        "  dataset: mine\n  extraction:\n    backbones:\n      resnet18:\n        modality: video\n"
        "        sha256: abababababab...\n        source: a.pth cdcdcdcdcdcd...\n    failed: 2\n"
    )
