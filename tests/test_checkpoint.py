"""Checkpoints: bit-exact round trip, exact fit or refusal, newest and best kept."""

import shutil
import subprocess
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import exchange
from conclugen_jax.method import train_state
from conclugen_jax.runs import checkpoint
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
        restored, info = restored_of(saved, saved.find("newest"), template)
    assert_same_bits(restored, original)
    assert info == {"note": [1, "x"]}
    assert jax.random.bits(restored.rng) == jax.random.bits(original.rng)


def restored_of(saved, step, template):
    tree, info = saved.restore_tree(step)
    return checkpoint.from_tree(tree, template, source="run"), info


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


@pytest.mark.parametrize("content", ['{"lost": 1.0}', '{"loss": "low"}', '{"loss": null}', '{"loss": true}'])
def test_a_checkpoint_whose_loss_is_damaged_is_never_the_best(tmp_path, content):
    with checkpoint.Checkpoints(tmp_path, keep_newest=3) as saved:
        for step, loss in [(1, 0.1), (2, 2.0), (3, 3.0)]:
            saved.save(step, state(step), {}, loss=loss)
    folder = tmp_path / checkpoint.FOLDER / "1"
    (folder / "metrics" / "metrics").write_text(content)
    checkpoint.seal(folder)
    with checkpoint.Checkpoints(tmp_path, read_only=True) as saved:
        assert saved.find("best") == 2
    assert [(row["loss"], row["best"]) for row in exchange.listing(tmp_path)] == [
        (None, False),
        (2.0, True),
        (3.0, False),
    ]


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
        (lambda p: {"a": p["a"]}, r"params/b is float32\[\], expected none"),
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


def test_a_flipped_bit_is_found_without_the_hashes_of_files_too(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep_newest=2) as saved:
        for step in (1, 2):
            saved.save(step, {"x": jnp.arange(5000.0) + step}, {})
    folder = tmp_path / checkpoint.FOLDER / "2"
    (folder / checkpoint.SUMS).unlink()
    found = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 2000):
        original = path.read_bytes()
        for position in range(200, len(original), len(original) // 4):
            path.write_bytes(original[:position] + bytes([original[position] ^ 4]) + original[position + 1 :])
            with checkpoint.Checkpoints(tmp_path, read_only=True) as saved:
                try:
                    tree, _ = saved.restore_tree(2)
                    assert np.array_equal(tree["x"], np.arange(5000) + 2), "restored silently wrong"
                except checkpoint.Damaged as e:
                    assert str(folder) in str(e)  # noqa: PT017
                    found += 1
        path.write_bytes(original)
    assert found


def test_a_checkpoint_under_another_step_is_refused(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as saved:
        saved.save(1, state(1), {})
    (tmp_path / checkpoint.FOLDER / "1").rename(tmp_path / checkpoint.FOLDER / "3")
    with (
        checkpoint.Checkpoints(tmp_path, read_only=True) as saved,
        pytest.raises(
            checkpoint.Damaged, match=r"checkpoints/3: the checkpoint is not what was saved as step 3; name another"
        ),
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


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two_steps")
    with checkpoint.Checkpoints(folder, keep_newest=2) as saved:
        for step in (1, 2):
            saved.save(step, state(step), {"note": step}, loss=1.0 / step)
    return folder


def flip(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


DAMAGES = {"flipped": flip, "cut": lambda data: data[: len(data) // 2], "emptied": lambda data: b"", "deleted": None}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_with_any_damaged_file_is_set_aside_and_the_one_before_used(two_steps, tmp_path, damage, capsys):
    template = jax.eval_shape(state)
    names = files_of(two_steps / checkpoint.FOLDER / "2")
    assert checkpoint.SUMS in names
    assert len(names) > 10
    for i, name in enumerate(names):
        workdir = shutil.copytree(two_steps, tmp_path / str(i))
        path = workdir / checkpoint.FOLDER / "2" / name
        before = path.read_bytes()
        path.unlink() if DAMAGES[damage] is None else path.write_bytes(DAMAGES[damage](before))
        with checkpoint.Checkpoints(workdir, keep_newest=2) as saved:
            restored, info = saved.restore_newest(template)
        said = capsys.readouterr().err
        if name == checkpoint.SUMS and damage == "deleted":  # the hash of the arrays still tells that they are whole
            assert_same_bits(restored, state(2))
            continue
        assert_same_bits(restored, state(1)), name
        assert info == {"note": 1}
        assert f"{workdir}/damaged/2-" in said, name
        (moved,) = (workdir / checkpoint.DAMAGED).iterdir()
        assert len(files_of(moved)) >= len(names) - 1
        with checkpoint.Checkpoints(workdir) as saved:
            assert saved.steps() == [1]
            saved.save(2, state(2), {})
        with checkpoint.Checkpoints(workdir, read_only=True) as saved:
            assert saved.steps() == [2]


def test_without_an_intact_checkpoint_nothing_is_started_anew(two_steps, tmp_path):
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    for step in ("1", "2"):
        (workdir / checkpoint.FOLDER / step / "record" / "metadata").write_text("{}")
    for _ in range(2):  # nor when the command is repeated
        with (
            checkpoint.Checkpoints(workdir) as saved,
            pytest.raises(ConclugenError, match=r"no intact checkpoint is left.*damaged; choose another --workdir"),
        ):
            saved.restore_newest(jax.eval_shape(state))


def test_an_intact_checkpoint_of_another_model_is_not_taken_for_damaged(two_steps, tmp_path):
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    with checkpoint.Checkpoints(workdir) as saved, pytest.raises(ConclugenError, match="does not fit the model"):
        saved.restore_newest(jax.eval_shape(lambda: state(0, 5)))
    assert not (workdir / checkpoint.DAMAGED).exists()


def test_a_read_only_look_moves_nothing(two_steps, tmp_path):
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    path = workdir / checkpoint.FOLDER / "2" / "record" / "metadata"
    path.write_bytes(flip(path.read_bytes()))
    with (
        checkpoint.Checkpoints(workdir, read_only=True) as saved,
        pytest.raises(checkpoint.Damaged, match=r"record/metadata has changed.*name another step"),
    ):
        saved.restore_tree(2)
    assert files_of(workdir) == files_of(two_steps)


def test_hashes_are_those_of_sha256sum(two_steps):
    folder = two_steps / checkpoint.FOLDER / "2"
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", checkpoint.SUMS], cwd=folder, check=True)
    assert len((folder / checkpoint.SUMS).read_text().splitlines()) == len(files_of(folder)) - 1


def failing(monkeypatch, times):
    """Let so many attempts to save fail."""
    left, commit = [times], checkpoint.Checkpoints._commit

    def attempt(self, *arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(28, "No space left on device")
        commit(self, *arguments)

    monkeypatch.setattr(checkpoint.Checkpoints, "_commit", attempt)


def test_a_failed_save_is_tried_again_after_older_checkpoints_are_deleted(tmp_path, monkeypatch):
    with checkpoint.Checkpoints(tmp_path, keep_newest=3, keep_best=1, max_failures=1) as saved:
        for step, loss in [(1, 2.0), (2, 1.0), (3, 3.0)]:
            saved.save(step, state(step), {}, loss=loss)
        saved.wait()
        failing(monkeypatch, 1)
        saved.save(4, state(4), {}, loss=4.0)
        saved.wait()
        assert saved.steps() == [2, 3, 4]  # the best and the newest stay
    with checkpoint.Checkpoints(tmp_path, read_only=True) as saved:
        assert_same_bits(restored_of(saved, 4, jax.eval_shape(state))[0], state(4))


def test_hashes_that_cannot_be_written_are_tried_again_without_the_checkpoint(tmp_path, monkeypatch):
    write, saved_steps = checkpoint.seal, []

    def attempt(folder):
        saved_steps.append(folder.name)
        if len(saved_steps) == 1:
            raise OSError(28, "No space left on device")
        write(folder)

    with checkpoint.Checkpoints(tmp_path, keep_newest=1) as saved:
        monkeypatch.setattr(checkpoint, "seal", attempt)
        saved.save(1, state(1), {})
        saved.wait()
        assert saved.steps() == [1]
    assert saved_steps == ["1", "1"]
    assert not checkpoint.changed(tmp_path / checkpoint.FOLDER / "1")
    assert (tmp_path / checkpoint.FOLDER / "1" / checkpoint.SUMS).exists()


def test_failed_saves_are_counted_in_a_row_and_the_last_must_not_fail(tmp_path, monkeypatch, capsys):
    with checkpoint.Checkpoints(tmp_path, max_failures=2) as saved:
        saved.save(1, state(1), {})
        saved.wait()
        failing(monkeypatch, 2)
        saved.save(2, state(2), {})
        restored, _ = saved.restore_newest(jax.eval_shape(state))  # as a run does that goes back
        assert_same_bits(restored, state(1))
        saved.save(3, state(3), {})
        saved.wait()
        assert saved.steps() == [3]
        assert capsys.readouterr().err.count("checkpoint of step 2 cannot be written (OSError") == 1
        failing(monkeypatch, 100)
        saved.save(4, state(4), {})
        saved.save(5, state(5), {})
        with pytest.raises(ConclugenError, match=r"checkpoint of step 5 cannot be written.*free space and repeat"):
            saved.save(6, state(6), {})
        with pytest.raises(ConclugenError, match="step 5"):
            saved.wait()
        saved._failures.clear()
    with checkpoint.Checkpoints(tmp_path, read_only=True) as saved:
        assert saved.steps() == [3]


def test_too_little_room_is_said_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 2**20))
    with checkpoint.Checkpoints(tmp_path, keep_newest=1, keep_best=1) as saved:
        with pytest.raises(ConclugenError, match=r"3 checkpoints of 0.00 GiB need 0.01 GiB, but 0.00 GiB are free"):
            saved.check_space({"x": jax.ShapeDtypeStruct((2**20,), jnp.float32)})
        saved.check_space({"x": jax.ShapeDtypeStruct((2**14,), jnp.float32)})


def test_a_disk_that_does_not_answer_does_not_hang_the_end(tmp_path, monkeypatch):
    answers = threading.Event()
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.2)
    monkeypatch.setattr(checkpoint.Checkpoints, "_commit", lambda *_: answers.wait())

    def run():
        with checkpoint.Checkpoints(tmp_path) as saved:
            saved.save(1, state(1), {})

    with pytest.raises(ConclugenError, match=r"still not written after 0 s; check the disk"):
        run()
    answers.set()
