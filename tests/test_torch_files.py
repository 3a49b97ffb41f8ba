"""Files of torch.save are read without torch, and nothing in them is run. The files in parity/files were written by torch."""

import io
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest

from conclugen_jax.data import pickles
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.networks import torch_files

FILES = Path(__file__).parent / "parity" / "files"


@pytest.mark.parametrize("name", ["archive.pth", "old.pth"])
def test_both_layouts_are_read_with_all_kinds_of_tensors(name):
    found = torch_files.read(FILES / name)
    state = found["state_dict"]
    assert state["0.weight"].shape == (4, 3, 3, 3)
    assert state["0.weight"].dtype == np.float32
    assert state["1.running_var"].tolist() == [1, 1, 1, 1]
    assert state["1.num_batches_tracked"].dtype == np.int64
    assert found["epoch"] == 3
    np.testing.assert_array_equal(found["optimizer"][0], [[0, 3], [1, 4], [2, 5]])  # a transposed view
    assert found["half"].tolist() == [1.5, 1.5, 1.5]  # bfloat16
    assert found["parameter"].tolist() == [2, 2]
    assert found["empty"].shape == (0, 3)
    assert found["many"][1:] == ["text", None, True]
    assert found["many"][0] == 7


def test_both_layouts_hold_the_same():
    a, b = (torch_files.read(FILES / name)["state_dict"] for name in ("archive.pth", "old.pth"))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_a_module_is_refused_by_name():
    with pytest.raises(ConclugenError, match=r"asks for 'torch\.nn\.modules.*nothing in the file was executed") as e:
        torch_files.read(FILES / "module.pth")
    assert "state_dict" in str(e.value)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def archive(path, tree, storages=()):
    """A file as torch.save lays it out."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", tree if isinstance(tree, bytes) else pickle.dumps(tree, protocol=2))
        file.writestr("a/byteorder", "little")
        for key, data in storages:
            file.writestr(f"a/data/{key}", data)
    return path


def test_nothing_is_executed(tmp_path):
    with pytest.raises(ConclugenError, match="nothing in the file was executed"):
        torch_files.read(archive(tmp_path / "evil.pth", {"x": Evil()}))
    old = b"".join(pickle.dumps(x, protocol=2) for x in (torch_files.MAGIC, 1001, {"little_endian": True}, Evil(), []))
    (tmp_path / "old.pth").write_bytes(old)
    with pytest.raises(ConclugenError, match="nothing in the file was executed"):
        torch_files.read(tmp_path / "old.pth")


class Fake:
    """Pickles a tensor with a shape and strides of one's choice over a storage."""

    def __init__(self, shape, strides, offset=0, length=4, kind="FloatStorage"):
        self.arguments = (offset, shape, strides, False)
        self.storage = ("storage", kind, "0", "cpu", length)


def pickled(fake):
    """Protocol 2 by hand: _rebuild_tensor_v2(persistent storage, ...)."""
    out = io.BytesIO()
    out.write(b"\x80\x02}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n(")
    kind, key, length = fake.storage[1], fake.storage[2], fake.storage[4]
    out.write(b"(X\x07\x00\x00\x00storage" + f"ctorch\n{kind}\n".encode())
    for text in (key, "cpu"):
        out.write(b"X" + len(text).to_bytes(4, "little") + text.encode())
    out.write(b"\x8a\x08" + length.to_bytes(8, "little", signed=True) + b"tQ")

    def number(n):
        out.write(b"\x8a\x08" + n.to_bytes(8, "little", signed=True))

    offset, shape, strides, _ = fake.arguments
    number(offset)
    for values in (shape, strides):
        out.write(b"(")
        for n in values:
            number(n)
        out.write(b"t")
    out.write(b"\x89}tRs.")
    return out.getvalue()


DATA = np.arange(4, dtype="<f4").tobytes()


def test_a_tensor_by_hand(tmp_path):
    path = archive(tmp_path / "a.pth", pickled(Fake((2, 2), (1, 2))), [("0", DATA)])
    np.testing.assert_array_equal(torch_files.read(path)["x"], [[0, 2], [1, 3]])


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (Fake((2, 3), (3, 1)), r"a tensor of shape \(2, 3\) that its storage does not hold"),
        (Fake((2, 2), (2, 1), offset=1), r"a tensor of shape \(2, 2\) that its storage does not hold"),
        (Fake((1 << 30,), (0,)), "the same numbers again and again"),  # a bomb
        (Fake((-1, 2), (1, 1)), r"a tensor of shape \(-1, 2\) that its storage does not hold"),
        (Fake((2,), (-1,), offset=0), "that its storage does not hold"),
        (Fake((2,), (1,), offset=-1), "that its storage does not hold"),
        (Fake((2,), (1, 1)), "that its storage does not hold .*same length"),
        (Fake((2,), (1,), length=8), "32 bytes has 16"),
        (Fake((2,), (1,), length=1 << 39), "has 16"),
        (Fake((2,), (1,), kind="ComplexStorage"), "asks for 'torch.ComplexStorage'"),
    ],
)
def test_impossible_tensors_are_refused(tmp_path, fake, message):
    with pytest.raises(ConclugenError, match=message):
        torch_files.read(archive(tmp_path / "a.pth", pickled(fake), [("0", DATA)]))


def test_what_is_referred_to_again_and_again_is_made_once(tmp_path):
    tree = ["text"] * 2
    for _ in range(60):
        tree = [tree, tree]  # 2 ** 60 texts, in a few hundred bytes
    found = torch_files.read(archive(tmp_path / "a.pth", {"x": tree}))["x"]
    for _ in range(60):
        assert found[0] is found[1]
        found = found[0]
    assert found == ["text", "text"]


def test_views_of_one_storage_share_its_memory(tmp_path):
    one = pickled(Fake((2**20,), (1,), length=2**20))
    start, end = one.index(b"ctorch._utils"), one.index(b"s.")
    tree = one[:3] + b"".join(b"X\x01\x00\x00\x00" + k + one[start:end] + b"s" for k in (b"a", b"b")) + b"."
    found = torch_files.read(archive(tmp_path / "a.pth", tree, [("0", bytes(2**22))]))
    assert found["b"].shape == (2**20,)
    assert np.shares_memory(found["a"], found["b"])
    many = b"".join(b"X\x01\x00\x00\x00" + k + one[start:end] + b"s" for k in (b"a", b"b", b"c", b"d", b"e"))
    with pytest.raises(ConclugenError, match="tensors of more than 4 times the bytes of the file"):
        torch_files.read(archive(tmp_path / "b.pth", one[:3] + many + b".", [("0", bytes(2**22))]))


def test_storages_that_overlap_in_the_archive_do_not_fill_the_memory(tmp_path):
    """The second lies in the first, so that both together are larger than the file."""
    with zipfile.ZipFile(io.BytesIO(), "w") as inner:
        inner.writestr("a/data/1", bytes(2**20))
        info = inner.getinfo("a/data/1")
        within = inner.fp.getvalue()
    one = pickled(Fake((1,), (1,), length=len(within), kind="ByteStorage"))
    two = pickled(Fake((1,), (1,), length=2**20, kind="ByteStorage")).replace(
        b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001"
    )
    tree = one[:-1] + b"X\x01\x00\x00\x00y" + two[two.index(b"ctorch._utils") :]
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
        file.writestr("a/data.pkl", tree)
        file.writestr("a/data/0", within)
        info.header_offset = file.getinfo("a/data/0").header_offset + 30 + len("a/data/0")
        file.filelist.append(info)
        file.NameToInfo[info.filename] = info
    with pytest.raises(ConclugenError, match=r"more data than the file holds|damaged archive \(Overlapped"):
        torch_files.read(tmp_path / "a.pth")


def test_one_storage_has_one_type(tmp_path):
    first, second = pickled(Fake((4,), (1,))), pickled(Fake((4,), (1,), kind="IntStorage"))
    # one dictionary with both: the first without its end, then key and value of the second
    both = first[:-2] + b"X\x01\x00\x00\x00y" + second[second.index(b"ctorch._utils") :]
    both = both[: -len(b"s.")] + b"su."
    both = both.replace(b"\x80\x02}", b"\x80\x02}(", 1)
    with pytest.raises(ConclugenError, match="has two types"):
        torch_files.read(archive(tmp_path / "a.pth", both.replace(b"su.", b"u."), [("0", DATA)]))


@pytest.mark.parametrize("view", ["view", 0, (0, 4)])
def test_views_of_storages_are_refused(view):
    unpickler = torch_files._Tensors(pickles.Content(memoryview(b"")), lambda key, size: bytes(size), 16)
    entry = ("storage", pickles.Name("torch.FloatStorage"), "0", "cpu", 4)
    with pytest.raises(pickles.Refused, match="a view of another"):
        unpickler.persistent_load((*entry, view))
    storages = [unpickler.persistent_load(each) for each in (entry, (*entry, None))]
    assert storages == [(np.float32, bytes(16))] * 2


def test_a_compressed_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", pickle.dumps({}, protocol=2))
    with pytest.raises(ConclugenError, match=r"torch\.save did not write"):
        torch_files.read(tmp_path / "a.pth")


def test_other_files_are_refused_in_a_sentence(tmp_path):
    for name, content, message in (
        ("empty", b"", "empty file"),
        ("text", b"no weights here", r"is text \('no weights here'\), not the file itself"),
        ("bytes", b"\xff\0", "not a file that torch.save wrote"),
        ("list", None, "holds a list"),
    ):
        path = tmp_path / name
        archive(path, [1]) if content is None else path.write_bytes(content)
        with pytest.raises(ConclugenError, match=message):
            torch_files.read(path)
    with pytest.raises(ConclugenError, match="No such file"):
        torch_files.read(tmp_path / "nothing.pth")


def test_keys_of_storages_that_are_no_text_are_refused(tmp_path):
    content = (FILES / "old.pth").read_bytes()
    at = content.rindex(b"\x80\x02]")  # the list of keys, the last pickle
    end = content.index(b"e.", at) + 2
    (tmp_path / "a.pth").write_bytes(content[:at] + pickle.dumps([0, 1], protocol=2) + content[end:])
    with pytest.raises(ConclugenError, match="storages other than those of its tensors"):
        torch_files.read(tmp_path / "a.pth")


def test_numbers_of_big_endian_machines_are_refused(tmp_path):
    with zipfile.ZipFile(FILES / "archive.pth") as old, zipfile.ZipFile(tmp_path / "a.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, "big" if name.endswith("byteorder") else old.read(name))
    with pytest.raises(ConclugenError, match="big-endian"):
        torch_files.read(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["archive.pth", "old.pth"])
def test_damaged_files_end_in_our_error(tmp_path, name):
    rng, valid, path = random.Random(1), (FILES / name).read_bytes(), tmp_path / name
    refused = []
    for i in range(600):
        content = bytearray(valid)
        if i % 3 == 0:
            del content[rng.randrange(len(content)) :]
        else:
            for _ in range(rng.choice((1, 3))):
                content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            torch_files.read(path)
        except ConclugenError as e:
            refused.append(str(e))
    assert len(refused) > 200
    assert not any("\n" in text for text in refused)
