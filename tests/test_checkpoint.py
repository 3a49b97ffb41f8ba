"""Checkpoints: bit-exact round trip, exact fit or refusal, newest and best kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conclugen_jax import checkpoint, train_state
from conclugen_jax.errors import ConclugenError
from tests.helpers import assert_same_bits


def state(seed=0, queue_length=3):
    rng = np.random.default_rng(seed)
    params = {"a": {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}, "b": jnp.float32(seed)}
    made = train_state.create(
        {"params": params, "batch_stats": {"norm": {"mean": jnp.ones(2)}}},
        optax.adamw(1e-3),
        jax.random.key(seed),
        queue_length=queue_length,
        num_clusters=2,
    )
    return made.replace(step=jnp.int32(seed))


@pytest.mark.parametrize("queue_length", [0, 3])
def test_round_trip_is_bit_exact_with_keys_moments_and_empty_arrays(tmp_path, queue_length):
    original = state(5, queue_length)
    with checkpoint.Checkpoints(tmp_path) as saved:
        saved.save(5, original, {"note": [1, "x"]})
    template = jax.eval_shape(lambda: state(0, queue_length))
    with checkpoint.Checkpoints(tmp_path, read_only=True) as saved:
        restored, info = saved.restore(saved.find("newest"), template)
    assert_same_bits(restored, original)
    assert info == {"note": [1, "x"]}
    assert jax.random.bits(restored.rng) == jax.random.bits(original.rng)


def test_what_is_saved_does_not_change_with_the_state_afterwards(tmp_path):
    x = np.ones(3, np.float32)
    tree = checkpoint.to_tree({"x": x})
    x[:] = 7
    np.testing.assert_array_equal(tree["x"], [1, 1, 1])


def test_newest_and_best_are_kept(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep_newest=2, keep_best=1) as saved:
        for step, loss in [(1, None), (2, 3.0), (3, 1.0), (4, 2.0), (5, None), (6, 4.0)]:
            saved.save(step, state(step), {}, loss=loss)
    with checkpoint.Checkpoints(tmp_path, read_only=True) as saved:
        assert saved.steps() == [3, 5, 6]
        assert [saved.find(w) for w in ("newest", "best", 5, "5")] == [6, 3, 5, 5]
        with pytest.raises(ConclugenError, match=r"no checkpoint 4; there are 'newest', 'best' and the steps 3, 5, 6"):
            saved.find(4)


def test_best_without_any_loss_is_the_newest(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as saved:
        saved.save(1, state(), {})
        saved.wait()
        assert saved.find("best") == 1


def test_no_checkpoint_is_said_plainly(tmp_path):
    with pytest.raises(ConclugenError, match="no checkpoint here"):
        checkpoint.Checkpoints(tmp_path, read_only=True)
    assert not list(tmp_path.iterdir())
    with checkpoint.Checkpoints(tmp_path) as saved, pytest.raises(ConclugenError, match="no checkpoint here"):
        saved.find("newest")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {**p, "c": jnp.ones(1)}, r"params/c is missing"),
        (lambda p: {"a": p["a"]}, r"params/b is not part of this model"),
        (
            lambda p: {**p, "a": {"kernel": jnp.ones((3, 4))}},
            r"params/a/kernel is float32\[3, 2\], expected float32\[3, 4\]",
        ),
        (lambda p: {**p, "b": jnp.int32(0)}, r"params/b is float32\[\], expected int32\[\]"),
    ],
)
def test_what_does_not_fit_exactly_is_refused(change, message):
    tree = checkpoint.to_tree({"params": state().params})
    template = {"params": change(state().params)}
    with pytest.raises(ConclugenError, match=message):
        checkpoint.from_tree(tree, template, source="run")


def test_a_flipped_bit_is_found_and_the_way_out_named(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep_newest=2) as saved:
        for step in (1, 2):
            saved.save(step, {"x": jnp.arange(5000.0) + step}, {})
    folder = tmp_path / checkpoint.FOLDER / "2"
    found = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 2000):
        original = path.read_bytes()
        for position in range(200, len(original), len(original) // 4):
            path.write_bytes(original[:position] + bytes([original[position] ^ 4]) + original[position + 1 :])
            with checkpoint.Checkpoints(tmp_path, read_only=True) as saved:
                try:
                    tree, _ = saved.restore_tree(2)
                    assert np.array_equal(tree["x"], np.arange(5000) + 2), "restored silently wrong"
                except ConclugenError as e:
                    assert f"delete {folder} to go on from step 1" in str(e)  # noqa: PT017
                    found += 1
        path.write_bytes(original)
    assert found


def test_a_checkpoint_under_another_step_is_refused(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as saved:
        saved.save(1, state(1), {})
    (tmp_path / checkpoint.FOLDER / "1").rename(tmp_path / checkpoint.FOLDER / "3")
    with (
        checkpoint.Checkpoints(tmp_path, read_only=True) as saved,
        pytest.raises(ConclugenError, match=r"step 3 is not what was saved; delete .* to start anew"),
    ):
        saved.restore_tree(3)


def test_leftovers_of_a_killed_save_are_ignored(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as saved:
        saved.save(1, state(1), {})
    stray = tmp_path / checkpoint.FOLDER / "2.orbax-checkpoint-tmp"
    stray.mkdir()
    (stray / "x").write_text("half")
    with checkpoint.Checkpoints(tmp_path) as saved:
        assert saved.steps() == [1]
        saved.save(2, state(2), {})
    with checkpoint.Checkpoints(tmp_path, read_only=True) as saved:
        assert saved.find("newest") == 2
