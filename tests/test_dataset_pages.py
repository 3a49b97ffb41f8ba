"""What docs/reference/datasets says: commands and flags that exist, counts, classes and folds that are those of the code."""

import re
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conclugen_jax.commands import app
from conclugen_jax.data import formats
from conclugen_jax.data.corpora import CORPORA
from conclugen_jax.data.importers.csd import LABEL_COLUMNS, read_folds
from conclugen_jax.data.requests import Request
from tests.helpers import ROOT
from tests.layouts import save

PAGES = {
    path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs/reference/datasets").glob("*.md"))
}
BLOCKS = {name: re.findall(r"```\n(.*?)```", text, re.DOTALL) for name, text in PAGES.items()}
COMMANDS = [
    (name, shlex.split(line.strip()))
    for name, blocks in BLOCKS.items()
    for block in blocks
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip().startswith("conclugen ")
]


def flags(launcher):
    """Names of a launcher's own flags."""
    return set(app.load(launcher).command.flags)


BUILD = flags("build_dataset")


def test_commands_have_modules_and_flags_that_exist():
    assert len(COMMANDS) > 8
    for page, (_, command, *arguments) in COMMANDS:
        known = flags(command)
        for argument in arguments:
            name, _, value = argument.removeprefix("--").partition("=")
            assert name.replace("-", "_") in known, (page, argument)
            if name == "dataset":
                assert value in (*CORPORA, formats.GENERIC), (page, argument)


def test_flags_in_the_text_exist():
    elsewhere = {"runner", "config"}  # of Beam; of training
    for page, text in PAGES.items():
        known = BUILD | flags("convert_mmsa") | flags("extract") | elsewhere
        named = {name.replace("-", "_") for name in re.findall(r"--([a-z][a-z_-]*)", text)}
        assert named <= known, (page, named - known)


def test_formats_are_all_listed():
    assert set(re.findall(r"^\| `(\w+)` \| (?:a|an|`\.csd`) ", PAGES["index"], re.MULTILINE)) == set(formats.FORMATS)


@pytest.mark.parametrize("dataset", CORPORA)
def test_the_page_of_a_corpus_says_what_the_code_knows(dataset):
    corpus, text = CORPORA[dataset], PAGES[dataset]
    for heading in ("**Where from.**", "**What to put where.**", "**Expected**", "**Command", "**Licence.**"):
        assert heading in text, heading
    (expected,) = corpus.expected.values()
    assert f"{expected:,}" in text.split("**Expected**")[1].split("**Command")[0]
    plain = " ".join(text.replace("**", "").split())
    assert ", ".join(corpus.label.names) in plain
    for low, high in corpus.ranges.values():
        assert f"from {low} to {high}" in plain
    for name in set().union(*corpus.drop.values()):
        assert f"`{name}`" in plain
    if dataset in LABEL_COLUMNS:
        counts = Counter(read_folds(dataset).values())
        assert " / ".join(f"{counts[s]:,}" for s in corpus.splits) + " videos" in plain
    commands = [arguments for page, arguments in COMMANDS if page == dataset]
    assert commands
    for arguments in commands:
        assert f"--dataset={dataset}" in arguments
        source = next(a.removeprefix("--source=") for a in arguments if a.startswith("--source="))
        put = text.split("**What to put where.**")[1].split("**Expected**")[0]
        assert source in put or source.endswith(".npz")


@pytest.mark.parametrize("dataset", ["caer", "voxceleb2"])
def test_files_put_where_the_page_says_are_what_its_command_reads(tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    for path, dim in re.findall(r"^(\S+\.npy) +float32 \[(\d+)\]", PAGES[dataset], re.MULTILINE):
        save(tmp_path / path, np.ones(int(dim), np.float32))
    ((_, arguments),) = [command for command in COMMANDS if command[0] == dataset]
    (source,) = [a.removeprefix("--source=") for a in arguments if a.startswith("--source=")]
    opened = formats.open_source(Request(dataset, Path(source)))
    assert opened.spec.modalities == {"video": 4096, "audio": 1024, "text": 768}
    assert [len(each.features) for each in opened.examples("train")] == [3]


def test_the_table_of_corpora_has_their_counts_and_numbers_of_classes():
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| (.*?) \|.*\[\1\]\(\1\.md\)", PAGES["index"], re.MULTILINE)
    assert {name: int(n.replace(",", "")) for name, n, _ in rows} == {
        name: next(iter(corpus.expected.values())) for name, corpus in CORPORA.items()
    }
    for name, _, labels in rows:
        number = len(CORPORA[name].label.names)
        assert not number or labels.startswith(f"{number} emotions")
