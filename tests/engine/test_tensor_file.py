"""Tensors come back from a file bit for bit, whatever their names, dtypes, shapes and strides."""

from __future__ import annotations

import hashlib
import io
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtbert.engine.tensor_file import TensorFile, file_record, read_tensors

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
WIDE_UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]
DTYPES = [*FLOATS, *INTEGERS, *WIDE_UNSIGNED, torch.bool]


def same_bits(a: Tensor, b: Tensor) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits at all (NaN payloads too), 0 to 3 dimensions, empty, transposed, strided and expanded ones."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if dtype == torch.bool:
        tensor = torch.randint(0, 2, shape, generator=generator).bool()
    else:
        size = torch.empty(0, dtype=dtype).element_size()
        raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
        tensor = raw.view(dtype).reshape(shape)
    kind = draw(st.sampled_from(["plain", "transposed", "strided", "expanded"]))
    if kind == "transposed" and tensor.dim() >= 2:
        tensor = tensor.transpose(0, -1)
    elif kind == "strided" and tensor.dim() >= 1:
        tensor = tensor[::2]
    elif kind == "expanded":
        tensor = tensor.expand(2, *tensor.shape)
    return tensor


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter("__metadata__".__ne__)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(names, tensors(), max_size=6))
def test_any_tensors_come_back(stored: dict[str, Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in stored.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        layout = TensorFile(stored)
        record = layout.write(path)
        data = path.read_bytes()
        back = read_tensors(path)
    assert record.size == layout.size == len(data)
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    assert back.keys() == stored.keys()
    assert all(same_bits(back[name], before[name]) for name in before)
    assert all(same_bits(stored[name], before[name]) for name in before), "writing changed a tensor"


def test_others_read_the_file_as_it_was_meant(tmp_path: Path) -> None:
    stored = {"b": torch.arange(3, dtype=torch.int8), "a": torch.randn(2, 3), "c": torch.tensor(True)}
    TensorFile(stored).write(tmp_path / "x")
    assert {k: v.tolist() for k, v in safetensors.torch.load_file(tmp_path / "x").items()} == {
        k: v.tolist() for k, v in stored.items()
    }


def test_every_tensor_begins_at_a_multiple_of_its_element_size(tmp_path: Path) -> None:
    stored = {"a": torch.zeros(3, dtype=torch.int8), "b": torch.zeros(5, dtype=torch.float64)}
    TensorFile(stored).write(tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    assert len(header) % 8 == 0
    assert b'"b":{"dtype":"F64","shape":[5],"data_offsets":[0,40]}' in header


def test_tied_tensors_are_written_in_full_and_parameters_keep_their_gradient(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 2))
    TensorFile({"one": parameter, "two": parameter, "half": parameter.data[1:3]}).write(tmp_path / "x")
    back = read_tensors(tmp_path / "x")
    assert torch.equal(back["one"], parameter)
    assert torch.equal(back["two"], parameter)
    assert torch.equal(back["half"], parameter[1:3])
    assert parameter.requires_grad
    assert parameter.grad is None


def test_read_tensors_do_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    TensorFile({"a": torch.ones(1000)}).write(path)
    back = read_tensors(path)
    with path.open("r+b") as file:
        file.truncate(10)
    assert float(back["a"].sum()) == 1000


def test_a_large_file_is_hashed_over_all_its_pieces(tmp_path: Path) -> None:
    record = TensorFile({"a": torch.randn(3 << 20), "b": torch.randn(7)}).write(tmp_path / "x")
    assert record == file_record(tmp_path / "x")
    assert record.sha256 == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "value", [3.0, [1, 2], torch.zeros(2, dtype=torch.complex64), torch.zeros(2, 2).to_sparse(), None]
)
def test_what_is_no_dense_tensor_of_real_numbers_is_refused_by_name(value: object) -> None:
    with pytest.raises(TypeError, match=r"encoder\.weight"):
        TensorFile({"encoder.weight": value})  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["__metadata__", "half a pair \ud800"])
def test_names_that_could_not_be_read_again_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"__metadata__|surrogate"):
        TensorFile({name: torch.zeros(1)})


def test_a_system_that_writes_less_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reluctant(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:1000])

    monkeypatch.setattr(Path, "open", lambda path, mode, buffering: Reluctant(path, mode))
    record = TensorFile({"a": torch.randn(999), "b": torch.randn(7)}).write(tmp_path / "x")
    monkeypatch.undo()
    assert file_record(tmp_path / "x") == record


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        TensorFile({"a": torch.zeros(1)}).write(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"precious"
