"""Libraries that tests compare with. They are optional: a test without its oracle is skipped."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, cast

import pytest


def oracle(name: str) -> Any:
    """Import `transformers` or `peft`; skips the test where it is not installed.

    Both look for another project's package called `kernels`, and from the top of this repository they would
    find the folder that is `mtbert.kernels` and try to import it; None in sys.modules says that there is no
    such package.
    """
    sys.modules.setdefault("kernels", cast(ModuleType, None))
    return pytest.importorskip(name)
