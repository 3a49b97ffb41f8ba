"""The log of a run: whole lines up to its step, mirrored, complete also after a full disk."""

import json
import struct

import pytest

from conclugen_jax.errors import ConclugenError
from conclugen_jax.runs import log as log_lib


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
    with log_lib.MetricsLog(tmp_path, 0, tensorboard=True) as log:
        log.write([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    assert event_steps(tmp_path / log_lib.FOLDER, "loss") == [1, 2]


def test_log_keeps_whole_lines_up_to_its_step(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\ngarbage\n{"step": "x"}\n[]\n{"step": 2}\n{"step": 3}\n{"step": 4')
    with log_lib.MetricsLog(tmp_path, 2) as opened:
        opened.write([{"step": 3, "loss": 0.5}])
    assert [json.loads(line) for line in log.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "loss": 0.5},
    ]


def test_a_line_that_is_no_utf8_is_damaged(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "note": "\xff"}\n')
    with pytest.raises(ConclugenError, match=r"metrics.jsonl, line 2: not a JSON object with a step"):
        log_lib.records(tmp_path / "metrics.jsonl")


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
    with log_lib.MetricsLog(tmp_path, 0) as log:
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
        with log_lib.MetricsLog(tmp_path, 0) as log:
            log._file = Full(log._file, 0)
            log.write([{"step": 1}])

    with pytest.raises(ConclugenError, match=r"metrics.jsonl: cannot be written; free space and repeat"):
        run()


def test_a_log_that_is_removed_is_an_error(tmp_path):
    with log_lib.MetricsLog(tmp_path, 0) as log:
        log.write([{"step": 1}])
        (tmp_path / "metrics.jsonl").unlink()
        with pytest.raises(ConclugenError, match="was removed during the run"):
            log.sync()
        (tmp_path / "metrics.jsonl").touch()
