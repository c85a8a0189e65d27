"""One export: the format's files and the model card, in a folder that appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

from mtbert.exporting.folder import new_folder
from mtbert.exporting.hugging_face import write_classifier, write_encoder
from mtbert.exporting.model_card import write_card
from mtbert.exporting.onnx_graph import write_graph
from mtbert.exporting.peft_adapter import write_adapters
from mtbert.exporting.run import ExportedRun
from mtbert.exporting.sentence_transformers import write_model


def write_export(exported: ExportedRun, format_name: str, target: Path) -> Path:
    """Write the model in a format of `FORMATS`; returns its folder, `target`.

    Raises ExportError or ModelFileError for a model that the format cannot carry, UserError when `target` is not new
    or the disk refuses.
    """
    with new_folder(target) as folder:
        if format_name == "hf":
            if exported.name is None:
                write_encoder(exported, folder)
            else:
                write_classifier(exported, folder)
        elif format_name == "peft":
            write_adapters(exported, folder)
        elif format_name == "sentence-transformers":
            exported = write_model(exported, folder)
        else:
            write_graph(exported, folder)
        write_card(exported, folder, format_name, target.name)
    return target
