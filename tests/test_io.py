"""Files are whole at any moment; digests tell tensors apart."""

import os

import pytest
import torch
from torch import nn

from decomp._util.io import digest, write_atomically


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_atomically(path, b"old")

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path], "and nothing half written"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_a_digest_changes_with_any_value_whatever_the_type_and_layout(dtype, shape):
    tensor = torch.zeros(shape, dtype=dtype)
    changed = tensor.clone()
    changed.view(-1)[-1] = 1
    assert digest(tensor) == digest(tensor.clone()) != digest(changed)
    assert digest([changed]) == digest({"x": changed}) == digest(nn.Buffer(changed))


def test_a_digest_reads_values_in_their_order_not_in_that_of_the_memory():
    tensor = torch.arange(6.0).reshape(2, 3)
    assert digest(tensor.mT.contiguous().mT) == digest(tensor) != digest(tensor.mT)
    assert digest(tensor[:, :0]) == digest([])


def test_strings_count_and_other_leaves_do_not():
    assert digest(["a", torch.ones(1)]) != digest(["b", torch.ones(1)])
    assert digest(["a", 1, None]) == digest(["a", 2.0])
