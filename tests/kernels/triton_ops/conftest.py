"""Where the Triton kernels run: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from support.interpreter import prepare

from mtbert.kernels import dispatch


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The device of the tensors, with kernels=triton in force."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        place = torch.device("cuda", torch.cuda.current_device())
    elif dispatch.triton_interpreted():
        prepare()
        place = torch.device("cpu")
    else:
        pytest.skip("no GPU, and TRITON_INTERPRET is not set to 1")
    with dispatch.use_backend("triton"):
        yield place
