"""Files of torch.save: what is there comes back, and what only is promised is never allocated."""

import io
import os
import pickle
import resource
import tempfile
import zipfile

import pytest
import torch

from levelset_ext.data.torch_files import read_torch_file
from levelset_ext.errors import InputError
from levelset_ext.recipes.files import load_checkpoint, save_checkpoint

READS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def saved(content, zipped=True):
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def with_members(blob, method=zipfile.ZIP_STORED, **replaced):
    """The zip file with some members made of others: ``data_pkl=lambda content: ...``."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(blob)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            change = replaced.get(name.split("/", 1)[1].replace("/", "_").replace(".", "_"))
            content = old.read(name)
            new.writestr(name, change(content) if change else content)
    return out.getvalue()


def refused(tmp_path, blob, match):
    path = tmp_path / "a.pt"
    path.write_bytes(blob)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=match):
        read_torch_file(path, "weights")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16  # KiB


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b) and type(a) is type(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@READS
def test_whatever_a_training_saves_comes_back(tmp_path, zipped):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    whole = torch.arange(24.0)
    content = {
        "state": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "parameter": net[0].weight,
        "views": [whole[2:14].view(3, 4).mT, whole[3:3], whole.view(2, 3, 4)[:, 1, ::2]],
        "expanded": torch.ones(1).expand(7),
        "dtypes": [torch.ones(2).to(t) for t in (torch.bfloat16, torch.half, torch.complex128)],
        "more dtypes": [torch.ones(2).to(t) for t in (torch.int8, torch.bool, torch.int16)],
        "plain": [None, True, 3, 2.5, 1 << 70, "text", float("inf"), (1, [2])],
        "torch's": [torch.float32, torch.Size([2, 3]), torch.device("cpu")],
        "empty": torch.zeros(0, 3),
    }
    path = tmp_path / "a.pt"
    path.write_bytes(saved(content, zipped))
    assert same(read_torch_file(path, "weights"), content)


@READS
def test_a_file_that_was_cut_off_anywhere_is_refused(tmp_path, zipped):
    blob = saved({"kind": "a", "x": torch.arange(100.0), "y": [torch.ones(3)] * 5}, zipped)
    for length in {*range(0, len(blob), 37), len(blob) - 1}:
        refused(tmp_path, blob[:length], r"a\.pt: expected weights, cannot read it \(.+\)")


def test_what_is_no_file_of_torch_is_refused(tmp_path):
    refused(tmp_path, b"", "the file is empty")
    refused(tmp_path, b"solid a\nendsolid a\n" * 9, "not written by torch.save")
    refused(tmp_path, pickle.dumps({"x": 1}), "not written by torch.save")
    with pytest.raises(InputError, match=r"none\.pt: expected weights.*No such file"):
        read_torch_file(tmp_path / "none.pt", "weights")
    with pytest.raises(InputError, match=r"expected weights.*[Dd]irectory"):
        read_torch_file(tmp_path, "weights")


TRAP = f"{tempfile.gettempdir()}/levelset-trap"


class Trap:
    def __reduce__(self):
        return os.mkdir, (TRAP,)


@READS
def test_no_code_is_run(tmp_path, zipped):
    refused(tmp_path, saved({"x": torch.ones(2), "trap": Trap()}, zipped), "posix.mkdir.*refused")
    assert not os.path.exists(TRAP)


SMALL = {"x": torch.arange(6.0).view(2, 3)}
# The number of elements, then the arguments of the tensor: offset 0, shape (2, 3), strides (3, 1).
ELEMENTS, PLACE = b"K\x06t", b"K\x00K\x02K\x03\x86q"
BILLIONS = b"\x8a\x05\x00\x00\x00\x00\x40"  # 2^38


@pytest.mark.parametrize("elements", [BILLIONS, b"K\x07", b"K\x05", b"J\xff\xff\xff\xff", b"N"])
@READS
def test_a_storage_that_is_not_in_the_file_is_refused(tmp_path, elements, zipped):
    """One element more than there are would have torch read beyond the end of the storage."""
    blob = saved(SMALL, zipped)

    def change(content):
        assert content.count(ELEMENTS) == 1 or content.count(ELEMENTS[:2] + b"Nt") == 1
        content = content.replace(ELEMENTS, elements + b"t")
        return content.replace(ELEMENTS[:2] + b"Nt", elements + b"Nt")

    blob = with_members(blob, data_pkl=change) if zipped else change(blob)
    refused(tmp_path, blob, "storage|promises|beyond")


@pytest.mark.parametrize("place", [
    b"K\x01K\x02K\x03\x86q",  # beyond the end by one
    b"K\x00" + BILLIONS + b"K\x03\x86q",  # set_ would enlarge the storage
    b"J\xff\xff\xff\xffK\x02K\x03\x86q",  # before its begin
    b"K\x00J\xff\xff\xff\xffK\x03\x86q",
])  # fmt: skip
@READS
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, place, zipped):
    def change(content):
        assert content.count(PLACE) == 1
        return content.replace(PLACE, place)

    blob = saved(SMALL, zipped)
    refused(
        tmp_path, with_members(blob, data_pkl=change) if zipped else change(blob), "tensor .*shape|"
        "tensor .*beyond",
    )  # fmt: skip


@READS
def test_an_expanded_tensor_is_no_larger_than_the_file(tmp_path, zipped):
    blob = saved({"x": torch.ones(1).expand(1 << 20, 1 << 20)}, zipped)
    assert len(blob) < 3000
    refused(tmp_path, blob, "larger than the file")


def test_a_compressed_member_is_refused(tmp_path):
    bomb = with_members(
        saved({"x": torch.zeros(1 << 22)}), zipfile.ZIP_DEFLATED, data_0=lambda zeros: zeros * 4
    )
    assert len(bomb) < 1 << 18  # of 64 MiB
    refused(tmp_path, bomb, "compressed")


def test_a_member_that_promises_more_than_the_file_is_refused(tmp_path):
    blob = bytearray(saved(SMALL))
    entry = blob.index(b"PK\x01\x02", blob.index(b"archive/data/0"))
    while not blob[entry + 46 :].startswith(b"archive/data/0"):
        entry = blob.index(b"PK\x01\x02", entry + 4)
    blob[entry + 20 : entry + 28] = (1 << 30).to_bytes(4, "little") * 2
    refused(tmp_path, bytes(blob), "promises 10737.* bytes in a file of")


def test_two_members_of_one_name_are_refused(tmp_path):
    blob = with_members(saved(SMALL))
    extended = io.BytesIO(blob)
    with zipfile.ZipFile(extended, "a") as archive:
        archive.writestr("archive/DATA.pkl", b"another")
    refused(tmp_path, extended.getvalue(), "there twice")


def test_memo_entries_and_lengths_without_end_are_refused(tmp_path):
    for pickled in (b"\x80\x02Nr\xff\xff\xff\x7f.", b"\x80\x02X\xff\xff\xff\x7fab."):
        refused(
            tmp_path, with_members(saved(SMALL), data_pkl=lambda _, p=pickled: p), "memo|expected"
        )


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    for content in ({"kind": "b"}, {"kind": torch.ones(3)}, ["kind"], torch.ones(2)):
        save_checkpoint(path, content)
        with pytest.raises(InputError, match="expected a a checkpoint, got another file"):
            load_checkpoint(path, "a")
    save_checkpoint(path, {"kind": "a", "n": 1})
    assert load_checkpoint(path, "a") == {"kind": "a", "n": 1}
