"""Named tensors in one safetensors file, hashed while they are written.

The format (https://github.com/huggingface/safetensors): eight bytes with the header's length
(little-endian), the header (JSON: name -> dtype, shape, offsets into the data), the data.
`safetensors.torch.save_file` would refuse tied tensors, report a full disk as text only, and need the file
to be read again for its hash; so writing is done here, one tensor at a time and without a second copy.
Reading is the library's, which checks all sizes in the header.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from mtbert.engine.durable import sync_file

_CHUNK = 4 << 20  # bytes hashed and written at a time: in the processor's cache for the second of the two
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class FileRecord(NamedTuple):
    """How to recognise a file that was written: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


class TensorFile:
    """The layout of a safetensors file for `tensors` (any strides, any device, tied tensors each in full).

    Raises TypeError for a value that is no dense tensor of a known dtype, ValueError for a name that
    the format reserves or that is no Unicode text.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"cannot store {name!r}: a {type(tensor).__name__} is no tensor")
            if tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
                raise TypeError(f"cannot store {name!r}: no place for {tensor.dtype}, {tensor.layout}")
            name.encode("utf-8")  # half a surrogate pair could be written, but never read
        if "__metadata__" in tensors:
            raise ValueError("a tensor cannot be named __metadata__: safetensors keeps that name for itself")
        # Wide elements first: every tensor then begins at a multiple of its element size.
        self._tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
        entries: dict[str, dict[str, object]] = {}
        end = 0
        for name, tensor in self._tensors.items():
            start, end = end, end + math.prod(tensor.shape) * tensor.element_size()
            entries[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        header = json.dumps(entries, separators=(",", ":")).encode("ascii")
        header += b" " * (-len(header) % 8)
        self._head = len(header).to_bytes(8, "little") + header
        self.size = len(self._head) + end

    def write(self, path: Path) -> FileRecord:
        """Write the new file `path`, flushed to the disk. The tensors are only read. Raises OSError."""
        digest = hashlib.sha256(self._head)
        with path.open("xb", buffering=0) as file:
            _write_all(file, memoryview(self._head))
            for tensor in self._tensors.values():
                tensor = tensor.detach().cpu().contiguous()
                # The stride of a single element is arbitrary, and reshape would keep it.
                data = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
                for start in range(0, len(data), _CHUNK):
                    chunk = data[start : start + _CHUNK]
                    digest.update(chunk)
                    _write_all(file, chunk)
            sync_file(file.fileno())
        return FileRecord(self.size, digest.hexdigest())


def _write_all(file: io.FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def file_record(path: Path) -> FileRecord:
    """Size and SHA-256 of the file as it can be read now. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file into memory of their own, on the CPU.

    The library's tensors are views of the mapped file: without a copy, whoever changes or cuts the file later
    changes the weights or kills the process. Raises OSError and safetensors.SafetensorError.
    """
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
