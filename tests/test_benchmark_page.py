"""The page of figures is what the command writes, and nothing else."""

import json

import pytest

from benchmarks import page, step


def test_the_page_is_what_the_command_writes():
    assert page.PAGE.read_text(encoding="utf-8") == page.text(), "python -m benchmarks.page writes it"


def test_machines_are_side_by_side_and_rows_that_were_not_measured_again_stay(tmp_path):
    def machine(name, **row):
        file = tmp_path / f"{name}.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
        about = {
            "machine": name,
            "versions": {"ours": {"framework": "jax 1"}},
            "date": "2026-11-29",
            "command": "make bench",
        }
        page.keep({**about, "rows": [row]}, before, file)

    machine("One", measure="step", ours=0.5, unit="s", torch=1.0, **{"torch / ours": 2.0, page.DIVIDED: 1.25})
    machine("Two", measure="step", ours=1.0, unit="s", **{"torch / ours": 1.5})
    machine("Two", measure="runs", ours=12345)
    said = page.text(tmp_path)
    assert "| step | torch / ours | 2 | 1.5 |" in said
    assert "| step | 0.5 s | torch 1 s | torch / ours 2; rates divided out 1.25 |" in said
    assert said.index("| runs | 12,345 |  |") < said.index("| step | 1 s | torch / ours 1.5 |")
    machine("Two", measure="step", ours=2.0, unit="s")
    assert "| step | 1 s" not in page.text(tmp_path)
    assert "| runs | 12,345 |" in page.text(tmp_path)


@pytest.mark.slow
def test_steps_are_timed_at_any_size():
    sizes = {"dims": {"video": 6, "audio": 5}, "representation_dim": 8, "reconstruction_dim": 4}
    assert step.time_steps(3, batch=16, **sizes)["seconds"] > 0
    assert step.time_epochs(2, batch=16, rows=32, **sizes)["seconds"] > 0
    assert step.fp8_error()["float8"] > step.fp8_error()["bfloat16"] > 0
