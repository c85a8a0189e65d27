"""Models that leave the project: a run's weights in the file formats of other libraries, none of which is imported.

Every writer gets an `ExportedRun` and an empty folder; `folder.new_folder` makes that folder appear whole or not at
all. `torch.onnx` and what it needs are imported by `onnx_graph` alone.
"""

from __future__ import annotations

FORMATS = ("hf", "peft", "sentence-transformers", "onnx")
