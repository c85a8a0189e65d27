"""Code that uses an exported model in the format's own library: for its card, and run by the tests."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

from mtbert.exporting.peft_adapter import BASE, hub_base
from mtbert.exporting.run import ExportedRun
from mtbert.exporting.sentence_transformers import is_cross_encoder

_SINGLE = '"A quiet triumph."'
_FIRST, _SECOND = '"A man is eating."', '"Someone eats food."'


def snippet(exported: ExportedRun, folder: Path, format_name: str, name: str) -> tuple[str, str]:
    """Python code for whoever stands beside the folder `name`, and what its result means."""
    code, words = {
        "hf": _encoder if exported.name is None else _classifier,
        "peft": _adapter,
        "sentence-transformers": _sentences,
        "onnx": _graph,
    }[format_name](exported, name)
    return dedent(code).lstrip(), words


def _encoder(exported: ExportedRun, name: str) -> tuple[str, str]:
    code = f"""
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained("{name}")
        model = AutoModel.from_pretrained("{name}").eval()
        inputs = tokenizer(["A quiet triumph.", "Dull."], padding=True, truncation=True, return_tensors="pt")
        result = model(**inputs).last_hidden_state
        print(result.shape)
    """
    return code, (
        "`heads.safetensors` holds the tasks' heads, which mtbert reads: `python -m mtbert.train --mode full"
        f" --model.pretrained {name}` goes on from encoder and heads."
    )


def _classifier(exported: ExportedRun, name: str) -> tuple[str, str]:
    task = exported.task
    text = f'{{"text": {_FIRST}, "text_pair": {_SECOND}}}' if task.is_pair else _SINGLE
    code = f"""
        from transformers import pipeline

        classify = pipeline("text-classification", model="{name}", top_k=None)
        result = classify({text}, truncation=True)
        print(result)
    """
    if task.kind == "similarity":
        low, high = task.score_range or (0.0, 1.0)
        return code, f"The one score is the similarity in label units, {low:g} to {high:g} (a regression)."
    if task.kind == "binary":
        return (
            code,
            "The head has one logit z; the model's two logits are (0, z), so that their softmax has sigmoid(z).",
        )
    return code, "The scores are the probabilities of the classes."


def _adapter(exported: ExportedRun, name: str) -> tuple[str, str]:
    base = hub_base(exported)
    model = f'"{base}"' if base is not None else f'"{name}/{BASE}"'
    per_task = exported.encoder.has_task_adapters
    first = exported.name or next(iter(exported.loaded.tasks))
    place = f'"{name}/{first}"' if per_task else f'"{name}"'
    code = f"""
        from peft import PeftModel
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained("{name}")
        model = PeftModel.from_pretrained(AutoModel.from_pretrained({model}), {place}).eval()
        inputs = tokenizer(["A quiet triumph.", "Dull."], padding=True, truncation=True, return_tensors="pt")
        result = model(**inputs).last_hidden_state
        print(result.shape)
    """
    words = "`python -m mtbert.train --mode lora --model.adapter DIR` begins from the adapter."
    return code, ("Every task has a folder with an adapter of its own. " if per_task else "") + words


def _sentences(exported: ExportedRun, name: str) -> tuple[str, str]:
    task = exported.task
    if is_cross_encoder(exported.settings.head):
        code = f"""
            from sentence_transformers import CrossEncoder

            model = CrossEncoder("{name}")
            result = model.predict([({_FIRST}, {_SECOND})])
            print(result)
        """
        meaning = {
            "similarity": "The result is the similarity in label units.",
            "binary": f"The result is the probability of {task.class_names[1:2] or (1,)}, one number a pair.",
            "classification": "The result is a logit for each class; `apply_softmax=True` gives probabilities.",
        }
        return code, meaning[task.kind].replace("('", '"').replace("',)", '"')
    code = f"""
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer("{name}")
        embeddings = model.encode([{_FIRST}, {_SECOND}])
        result = model.similarity(embeddings[:1], embeddings[1:])
        print(result)
    """
    return code, _from_similarity(exported)


def _from_similarity(exported: ExportedRun) -> str:
    """How the task's output follows from the similarity of the embeddings."""
    head, task = exported.head, exported.task
    feature = head.features[0]
    output = head.output
    if task.kind == "classification":
        return f"The similarity is the {feature} of the embeddings; what the head makes of it is not in this format."
    gain, offset = (1.0, 0.0) if output is None else (output.weight.item(), output.bias.item())
    if task.score_range is not None:
        low, high = task.score_range
        gain, offset = (high - low) * gain, low + (high - low) * offset
        return f"The task's score is {offset:.6g} + {gain:.6g} * similarity, in label units."
    return f"The task's probability is sigmoid({offset:.6g} + {gain:.6g} * similarity)."


def _graph(exported: ExportedRun, name: str) -> tuple[str, str]:
    pair_rows = exported.name is not None and bool(exported.head.features)
    if pair_rows:
        fed = f"""first = tokenizer([{_FIRST}], truncation=True, return_tensors="np")
        second = tokenizer([{_SECOND}], truncation=True, return_tensors="np")
        inputs = {{
            "first_input_ids": first["input_ids"],
            "first_attention_mask": first["attention_mask"],
            "second_input_ids": second["input_ids"],
            "second_attention_mask": second["attention_mask"],
        }}"""
    else:
        pair = exported.name is not None and exported.task.is_pair
        texts = f"[{_FIRST}], [{_SECOND}]" if pair else f"[{_SINGLE}]"
        fed = f'inputs = dict(tokenizer({texts}, truncation=True, return_tensors="np"))'
    code = f"""
        import onnxruntime
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained("{name}")
        session = onnxruntime.InferenceSession("{name}/model.onnx")
        {fed}
        result = session.run(None, inputs)[0]
        print(result)
    """
    if exported.name is None:
        return code, "The outputs are `last_hidden_state` and `pooler_output`."
    meaning = {
        "similarity": "`score` is in label units.",
        "binary": "`logits` is one number z an example; sigmoid(z) is the probability of the second class.",
        "classification": "`logits` has one number a class; their softmax is the classes' probabilities.",
    }
    return code, meaning[exported.task.kind] + " Names of inputs and classes: `graph.json`."
