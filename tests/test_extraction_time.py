"""What an extraction says of its time, and work that backbones share."""

import functools
from pathlib import Path

import numpy as np

from conclugen_jax.extract import backbones, outcome, preparation
from conclugen_jax.extract.backbones import Networks
from conclugen_jax.extract.media.clip import Clip
from conclugen_jax.extract.outcome import Tally
from conclugen_jax.extract.preparation import Parts
from conclugen_jax.extract.utterance import Utterance
from conclugen_jax.extract.vectors import Clock, vectors
from tests import clips


def test_rate_and_shares_of_the_parts():
    parts = Parts({"decoding": 2.0, "faces": 5.98, "minilm": 2.0, "writing": 0.02})
    tally = Tally(done=25, failures={"a": "no face was found"}, reused=6, clock=Clock(3.0, 7.0, parts))
    assert outcome.lines(tally, Path("data/mine/1.0.0"), 26)[-2:] == [
        "25 utterances extracted, 6 of them before; 2 a second, 70% of the time computing features",
        "the work of all processes: faces 60%, decoding 20%, minilm 20%",
    ]
    tally.clock = Clock(4.0, 1.0, parts)
    *_, line, _ = outcome.lines(tally, Path("data/mine/1.0.0"), 26)
    assert line.endswith("4 a second, 80% of the time waiting for decoded clips")
    assert "extracted" not in str(
        outcome.lines(Tally(done=3), Path("data/mine/1.0.0"), 3)
    )  # done by an earlier command


def test_every_part_of_the_work_is_timed(tmp_path):
    path = clips.write(tmp_path / "a.mkv", clips.steady(1.0), sound=clips.tone(1.0))
    networks = backbones.load(Networks((), ("tests.own_backbones:pictures", "tests.own_backbones:loudness")))
    how, clock = preparation.recipe(networks), Clock()
    jobs = [(Utterance(f"{i}", "", str(path)), 1) for i in range(20)]
    assert len(list(vectors(preparation.prepared(jobs, how, 0), networks, clock))) == 20
    assert clock.parts.keys() == {"decoding", "pictures", "loudness", "compiling"}  # of each network its first batch
    assert min(clock.parts.values()) > 0
    assert sum(clock.parts.values()) <= clock.host + clock.device


def test_backbones_share_frames_that_are_resized(monkeypatch):
    sizes = []
    monkeypatch.setattr(backbones, "resize", lambda frame, size: sizes.append(size) or frame[: size[0], : size[0]])
    frames = [np.full((20, 20, 3), i, np.uint8) for i in range(4)]
    clip = Clip(frames, np.arange(4) / 4, 4.0, None)
    for rate, size in ((4.0, 10), (4.0, 10), (2.0, 10), (4.0, 20), (1.0, 8)):
        (found,) = functools.partial(backbones.frames, rate=rate, size=size)(clip, None)
        assert found[:, 0, 0, 0].tolist() == list(range(0, 4, round(4 / rate)))
    assert sizes == [(10, 10)] * 4 + [(8, 8)]
