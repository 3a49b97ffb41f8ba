"""The folder of a run: log, mirrors, lock, and what a person sees of progress."""

import io
import json
import logging
import struct

import pytest

from conclugen_jax.errors import ConclugenError
from conclugen_jax.run import trackers
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.system import progress


def event_steps(folder, tag):
    """Steps of a scalar in TensorBoard event files, read by their framing: length, crc, payload, crc."""
    steps = []
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            payload, data = data[12 : 12 + length], data[16 + length :]
            if tag.encode() in payload:
                assert payload[9] == 0x10  # after field 1, eight bytes of wall time, comes field 2: the step
                steps.append(payload[10])  # a varint, one byte for the small steps here
    return steps


def test_tensorboard_mirrors_the_log(tmp_path):
    with workdir_lib.MetricsLog(tmp_path, 0, tensorboard=True) as log:
        log.write([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    assert event_steps(tmp_path / trackers.FOLDER, "loss") == [1, 2]


def test_a_failing_mirror_warns_once_and_the_log_goes_on(tmp_path, monkeypatch, caplog):
    def fail(self, records):
        raise RuntimeError("disk gone")

    monkeypatch.setattr(trackers.TensorBoard, "write", fail)
    with caplog.at_level(logging.WARNING), workdir_lib.MetricsLog(tmp_path, 0, tensorboard=True) as log:
        log.write([{"step": 1}])
        log.write([{"step": 2}])
    assert [r.getMessage().count("disk gone") for r in caplog.records] == [1]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_missing_tensorboard_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(ConclugenError, match="pip install tensorboardX"):
        trackers.TensorBoard(tmp_path, 0)


def test_log_keeps_whole_lines_up_to_its_step(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\ngarbage\n{"step": "x"}\n[]\n{"step": 2}\n{"step": 3}\n{"step": 4')
    with workdir_lib.MetricsLog(tmp_path, 2) as opened:
        opened.write([{"step": 3, "loss": 0.5}])
    assert [json.loads(line) for line in log.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "loss": 0.5},
    ]


def test_plain_lines_when_piped():
    out = io.StringIO()
    with progress.Display("run", total_steps=8, steps_per_epoch=4, file=out) as display:
        for step in (2, 4, 6, 8):
            display.update(step, {"loss": 12.34567, "examples/s": 12345.6}, steps_per_second=0.05)
    lines = out.getvalue().splitlines()
    # The first, and the last: all within ten seconds.
    assert lines[0] == "step 2/8  epoch 1/2  loss 12.35  examples/s 12,346  ETA 0:02:00"
    assert lines[1].startswith("step 8/8  epoch 2/2  loss 12.35  examples/s 12,346  ETA 0:00:00")
    assert len(lines) == 2


def test_the_time_left_counts_what_lies_between_dispatches(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with progress.Display("run", total_steps=100, steps_per_epoch=100, file=out) as display:
        for step in (10, 20, 30):
            display.update(step, {}, steps_per_second=10.0)
            now[0] += 20.0  # a checkpoint
    lines = out.getvalue().splitlines()
    assert [line.partition("ETA ")[2] for line in lines] == ["0:00:09", "0:02:40", "0:02:20"]


def test_a_counter_says_rate_and_time_left_of_what_it_saw_done(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with progress.Counter("extracting", file=out, unit="clips") as counter:
        for done, seconds in ((60, 0.5), (60, 19.5), (62, 5.0), (63, 15.0)):
            counter(done, 100)
            now[0] += seconds
        counter(100, 100)
    assert out.getvalue().splitlines() == [
        "extracting: 63/100, 0.2 clips/s, ETA 0:03:05",
        "extracting: 100/100, 1.9 clips/s, ETA 0:00:00",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    with progress.Display("my run", total_steps=8, steps_per_epoch=4, first_step=4, file=out) as display:
        display.say("a line that stays")
        display.update(6, {"loss": 1.5, "loss/clustering": 0.25, "examples/s": 10.0}, steps_per_second=1.0)
    shown = out.getvalue()
    for piece in (
        "my run",
        "6/8",
        "epoch 2/2",
        "loss 1.5",
        "clustering 0.25",
        "examples/s 10",
        "ETA",
        "a line that stays",
    ):
        assert piece in shown, piece


class Full:
    """A file on a disk that takes so many bytes more."""

    def __init__(self, file, room):
        self._file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        written = self._file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_what_a_full_disk_does_not_take_is_written_later_and_the_log_is_complete(tmp_path, capsys):
    with workdir_lib.MetricsLog(tmp_path, 0) as log:
        log._file = Full(log._file, 15)
        for step in (1, 2, 3):
            log.write([{"step": step}])
        assert not log.sync()
        assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"s'
        assert capsys.readouterr().err.count("metrics.jsonl: cannot be written (No space left on device)") == 1
        log._file.room = 1000
        log.write([{"step": 4}])
        assert log.sync()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_lines_that_were_never_written_are_an_error_at_the_end(tmp_path):
    def run():
        with workdir_lib.MetricsLog(tmp_path, 0) as log:
            log._file = Full(log._file, 0)
            log.write([{"step": 1}])

    with pytest.raises(ConclugenError, match=r"metrics.jsonl: cannot be written; free space and repeat"):
        run()


def test_a_log_that_is_removed_is_an_error(tmp_path):
    with workdir_lib.MetricsLog(tmp_path, 0) as log:
        log.write([{"step": 1}])
        (tmp_path / "metrics.jsonl").unlink()
        with pytest.raises(ConclugenError, match="removed while the run was going on"):
            log.sync()
        (tmp_path / "metrics.jsonl").touch()
