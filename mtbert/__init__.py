"""Fine-tune one BERT encoder on several sentence tasks at once, each fast path held against plain PyTorch."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from mtbert.installation import missing_extension

if TYPE_CHECKING:
    from mtbert.api import Model
    from mtbert.engine.precision import Precision

__version__ = "0.1.0"


def load(
    path: str | Path,
    *,
    device: str = "auto",
    precision: Precision | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
    trust_plugins: bool = False,
) -> Model:
    """The trained model of a run's folder, to predict and to encode; `minilm` or a model's folder: to encode alone.

    device: auto, cpu, cuda or cuda:N. precision: what the encoder computes in (float32, tf32, bf16, fp16, auto); by
    default what the run was trained in, and auto (bf16 where the hardware multiplies it) where there is no run.
    max_tokens: of a pass, by default the run's, or 4096: its memory; results do not depend on it beyond rounding.
    threads: of PyTorch during the model's calls; by default those that the process has.
    trust_plugins: import the plugins that a run's configuration names; they are Python code, which can do anything.

    Raises `mtbert.errors.UserError` for what cannot be loaded, with the reason.
    """
    from mtbert.api import load_model  # PyTorch and all else: only whoever loads a model waits for it

    return load_model(
        path,
        device=device,
        precision=precision,
        max_tokens=max_tokens,
        threads=threads,
        trust_plugins=trust_plugins,
    )


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
