"""Fine-tune one BERT encoder on several sentence tasks at once, each fast path held against plain PyTorch."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

from mtbert.installation import missing_extension

__version__ = "0.1.0"


def _check_installation() -> None:
    package = Path(__file__).resolve().parent
    kernels = importlib.util.find_spec("mtbert.kernels")
    if kernels is None or kernels.origin is None:
        raise ImportError(
            "mtbert is not installed: the folder kernels/ becomes mtbert.kernels by installing. "
            "Run `pip install -e .` in the project's folder."
        )
    if Path(kernels.origin).resolve().parent not in (package / "kernels", package.parent / "kernels"):
        warnings.warn(
            f"mtbert comes from {package}, but its kernels from {Path(kernels.origin).parent}, another copy. "
            "Run `pip install -e .` in the folder that is meant, or start Python outside of it.",
            RuntimeWarning,
            stacklevel=3,
        )
    why = missing_extension(package)
    if why is not None:
        warnings.warn(
            f"mtbert runs without its C++ and CUDA kernels: {why}. Everything works, on Triton and plain "
            "PyTorch; a CPU is slower. `python -m mtbert.doctor` says more.",
            RuntimeWarning,
            stacklevel=3,
        )


_check_installation()
