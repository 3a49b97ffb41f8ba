"""The feed of a training loop gives the same rows on every tier, from a table on the device or sent in bounded parts."""

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import batches, builders
from conclugen_jax.data.batches import HostTable
from conclugen_jax.train import feed, parallel
from tests.helpers import Faces, assert_same_bits, fed, log_without_times, plan, tiny_config

ROWS = {
    "features": {"video": np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)},
    "present": {"video": np.ones(50, bool)},
    "label": np.arange(50),
}
KEYS = ("features", "label")


def test_order_on_a_device_is_that_of_the_host():
    order = jax.jit(lambda epoch: batches.epoch_order(7, epoch, 1000, xp=jax.numpy))
    for epoch in (0, 1, 99):
        np.testing.assert_array_equal(order(epoch), batches.epoch_order(7, epoch, 1000))


def test_variants_on_a_device_are_those_of_the_host():
    indices = np.arange(30)
    for pairs in ((), ("video",)):
        chosen = jax.jit(
            lambda epoch, pairs=pairs: batches.variant_choices(
                jax.numpy.asarray(indices), {"video": 3}, seed=7, epoch=epoch, pairs=pairs, xp=jax.numpy
            )
        )
        expected = batches.variant_choices(indices, {"video": 3}, seed=7, epoch=4, pairs=pairs)
        assert_same_bits(chosen(4), expected)


def test_rows_that_stay_on_the_host_are_sent_in_bounded_parts():
    row = 3 * 4 + 8
    config = tiny_config(train__batch_size=10, train__num_epochs=2, train__steps_per_dispatch=50)
    rows = HostTable(ROWS, np.arange(50))
    for gib, lengths in ((1.0, [5]), (25 * row / 2**30, [2, 2, 1]), (0.0, [1] * 5)):
        config.data.feed_gib = gib
        batches = feed.Feed(rows, config, jax.devices()[:2], keys=KEYS)
        assert batches.lengths == lengths
        seen = [(d.num_steps, got["label"]) for d, got in fed(batches)]
        assert [n for n, _ in seen] == lengths * 2
        labels = np.concatenate([x for _, x in seen])
        assert labels.shape == (10, 10)
        assert all(sorted(epoch) == list(range(50)) for epoch in labels.reshape(2, 50).tolist())
    assert feed.Feed(HostTable(ROWS, np.arange(50), tier="device"), config, jax.devices()[:2]).lengths == [5]


@pytest.mark.parametrize("tier", ["device", "host"])
def test_rows_stored_in_bfloat16_are_rounded_alike_on_every_tier(tier):
    config = tiny_config(train__batch_size=10, train__num_epochs=1, data__storage_dtype="bfloat16")
    rows = HostTable(ROWS, np.arange(50), tier=tier)
    fed_rows = feed.Feed(rows, config, jax.devices()[:1], keys=KEYS)
    got = next(iter(fed(fed_rows)))[1]
    x, of = got["features"]["video"], ROWS["features"]["video"][got["label"]]
    assert x.dtype == np.float32
    # To 8 significant bits, to nearest.
    np.testing.assert_allclose(x, of, rtol=2**-8)
    assert not np.array_equal(x, of)
    bits = x.reshape(-1).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    if tier == "device":
        assert fed_rows.table["features"]["video"].dtype == jax.numpy.bfloat16
        assert fed_rows.table["label"].dtype == np.int32


def test_a_run_compiles_two_programs_whatever_the_lengths_of_its_dispatches(tmp_path, monkeypatch, capsys):
    compiled = []
    compile_it = parallel.compiled
    monkeypatch.setattr(parallel, "compiled", lambda program, *a: compiled.append(program) or compile_it(program, *a))
    path = builders.build(Faces((80, 24, 24)), tmp_path / "data")
    # 5 steps an epoch in dispatches of 3 and 2.
    config = tiny_config(path, data__tier="device", train__steps_per_dispatch=3, train__num_epochs=4)
    with jax.log_compiles(False):
        pretrain.pretrain(config, tmp_path / "run", devices=jax.devices()[:1])
    assert len(compiled) == 2
    assert len(log_without_times(tmp_path / "run")) == 20
    said = capsys.readouterr().err
    assert said.count("compiled without clustering in") == said.count("compiled with clustering in") == 1


def test_steps_that_are_left_out_are_dispatches_of_their_own():
    # Two epochs of seven steps in dispatches of 4 and 3, from step 1; steps 3, 4, 7 and 8 are passed over.
    found = [tuple(d) for d in plan(1, [4, 3], 2, left_out=[3, 4, 7, 8])]
    assert found == [
        (0, 1, 1, 2, False, False),
        (0, 2, 1, 3, False, True),
        (0, 3, 1, 4, False, True),
        (0, 4, 2, 6, False, False),
        (0, 6, 1, 7, True, True),
        (1, 0, 1, 8, False, True),
        (1, 1, 3, 11, False, False),
        (1, 4, 3, 14, True, False),
    ]
