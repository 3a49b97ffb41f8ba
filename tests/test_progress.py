"""What a person sees of progress: a bar on a terminal, plain lines elsewhere."""

import io

from conclugen_jax.system import progress


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
    pieces = "my run", "6/8", "epoch 2/2", "loss 1.5", "clustering 0.25", "examples/s 10", "ETA", "a line that stays"
    for piece in pieces:
        assert piece in shown, piece


def test_a_counter_on_a_terminal(monkeypatch):
    now = [100.0]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = Terminal()
    with progress.Counter("building", file=out) as counter:
        counter(0, 1000)
        now[0] += 0.5
        counter(100, 1000)
        assert not out.getvalue()
        now[0] += 10.0
        counter(600, 1000)
    assert "building" in out.getvalue()
    assert "600/1,000, 50 examples/s, ETA 0:00:08" in out.getvalue()


def test_a_counter_of_short_work_shows_nothing():
    for out in (Terminal(), io.StringIO()):
        with progress.Counter("building", file=out) as counter:
            for done in range(5):
                counter(done, 4)
        assert not out.getvalue()
