"""Every command line of the documentation parses; those of the first hour with features run."""

import re
import shlex
import types

import numpy as np
import pytest

from conclugen_jax.commands import app
from conclugen_jax.method import losses
from tests.helpers import ROOT, run
from tests.test_docs import PAGES

BLOCK = re.compile(r"^```[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MENTION = re.compile(r"(?<!`)`conclugen ([a-z_]+)([^`]*)`(?!`)")


def command_lines(text):
    """Yield the words of each command ``conclugen ...`` in the blocks of a page."""
    for line in "\n".join(BLOCK.findall(text)).replace("\\\n", " ").splitlines():
        if re.match(r"(\$ )?(\w+=\S+ )*conclugen [a-z]", line.strip()):
            words = shlex.split(re.split(r" [|&>;]| \.\.\.", line)[0], comments=True)
            yield words[words.index("conclugen") + 1 :]


def told(words):
    """Leave out what stands for something of the reader's, and fill in numbers."""
    return [re.sub(r"=(N|F|\$\w+)$", "=1", word) for word in words if word not in ("--help", "${W[@]}", "[--quick]")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_command_lines_parse(path, monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text("from configs import small\n\nget_config = small.get_config\n")
    monkeypatch.chdir(tmp_path)
    text = path.read_text(encoding="utf-8")
    for name, *arguments in command_lines(text):
        app.load(name).command.parse(told(arguments))
    for name, arguments in MENTION.findall(BLOCK.sub("", text)):
        known = {"help", *app.load(name).command.described()}
        flags = {flag.replace("-", "_") for flag in re.findall(r"--([\w.-]+)", arguments)}
        assert {f for f in flags if f not in known and f.removeprefix("no") not in known} == set(), (name, arguments)


@pytest.mark.slow
def test_the_first_hour_with_features_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/start/own_features.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(program)
    quick = {"pretrain": ["--config.train.num_epochs=13"], "build": ["--num_workers=1"], "probe": ["--draws=2"]}
    for name, *arguments in command_lines(text):
        if name != "run":  # tests/test_run.py does
            run(name, *arguments, *quick.get(name, ()))
    assert (tmp_path / "runs/mine/label_efficiency.md").is_file()
    assert (tmp_path / "runs/mine_linear/result.json").is_file()


def test_the_loss_of_the_guide_passes_the_test_of_the_guide():
    text = (ROOT / "docs/how-to/add_loss.md").read_text(encoding="utf-8")
    loss, *_, check = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names = {**vars(losses)}
    exec(loss, names)
    exec(check, names | {"np": np, "losses": types.SimpleNamespace(**names)}, found := {})
    found["test_alignment_is_the_mean_squared_distance"]()
