"""Fine-tune one BERT encoder on several sentence tasks at once, each fast path held against plain PyTorch."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

from mtbert.installation import missing_extension

__version__ = "0.1.0"


def _check_installation() -> None:
    if importlib.util.find_spec("mtbert.kernels") is None:
        raise ImportError(
            "mtbert is not installed: the folder kernels/ becomes mtbert.kernels by installing. "
            "Run `pip install -e .` in the project's folder."
        )
    why = missing_extension(Path(__file__).parent)
    if why is not None:
        warnings.warn(
            f"mtbert runs without its C++ and CUDA kernels: {why}. Everything works, on Triton and plain "
            "PyTorch; a CPU is slower. `python -m mtbert.doctor` says more.",
            RuntimeWarning,
            stacklevel=3,
        )


_check_installation()
