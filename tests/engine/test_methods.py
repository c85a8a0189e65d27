"""Methods together in a real training: what the log holds, what the report shows, and what is refused at start-up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mtbert import evaluate
from mtbert.errors import ConfigError
from mtbert.train import main


def train(bert: Path, folder: Path, *options: str) -> list[dict]:
    run = folder / "run"
    main(
        [
            "--data=sample",
            f"--model.pretrained={bert}",
            f"--cache={folder / 'cache'}",
            f"--output={run}",
            "--max_tokens=2048",
            "--curriculum.epoch_length=4",
            "--epochs=1",
            "--run.log_every=2",
            "--run.tensorboard=false",
            "--evaluation.train_examples=10",
            "--evaluation.resamples=10",
            *(
                f"--{task}.{option}"
                for task in ("sst", "para", "sts")
                for option in ("batch_size=6", "max_length=64")
            ),
            *options,
        ]
    )
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_everything_at_once_is_logged_and_reported(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = train(
        tiny_bert,
        tmp_path,
        "--surgery.method=pcgrad",
        "--simcse.tasks=[sst]",
        "--mnrl.tasks=[para]",
        "--mnrl.symmetric=true",
        "--cosine_embedding.tasks=[sts]",
        "--cosine_embedding.final_margin=0.5",
        "--triplet.tasks=[para]",
        "--smart.tasks=[sst,para,sts]",
        "--bregman.tasks=[sst]",
        "--mixout.p=0.1",
        "--optim.pretrained_decay=0.01",
        "--optim.layer_decay=0.9",
        "--model.extra_hidden.depth=1",
        "--model.pals.size=24",
        "--evaluation.selection=half",
    )
    steps = [line for line in lines if line["kind"] == "step"]
    assert len(steps) == 2
    names = {"sst/simcse", "para/mnrl", "sts/cosine_embedding", "para/triplet", "sst/bregman"}
    names |= {f"{task}/smart" for task in ("sst", "para", "sts")}
    for line in steps:
        assert set(line["objective"]) == names
        assert all(math.isfinite(value) for value in line["objective"].values())
        assert line["objective"]["sst/simcse"] > 0
        gradients = line["gradients"]
        assert gradients["steps"] == 2
        assert set(gradients["cosine"]) == {"sst/para", "sst/sts", "para/sts"}
        assert all(-1 <= value <= 1 for value in gradients["cosine"].values())
        assert all(value > 0 for value in gradients["norm"].values())
        assert len(gradients["altered"]) == 6
    evaluation = next(line for line in lines if line["kind"] == "evaluation")
    assert evaluation["embedding"]["uniformity"] < 0
    report = (tmp_path / "run" / "report.md").read_text()
    for title in ("Objectives", "Gradients", "Alignment and uniformity"):
        assert f"# {title}" in report, title
    assert "on selection half of dev" in report
    capsys.readouterr()
    evaluate.main([str(tmp_path / "run"), "--data", "sample"])  # the run's own tables, named
    assert "optimistic" in capsys.readouterr().out
    for plot in ("objectives", "gradients", "embedding"):
        assert (tmp_path / "run" / "plots" / f"{plot}.png").stat().st_size > 1000


def test_a_sequential_run_is_evaluated_after_every_pass(tiny_bert: Path, tmp_path: Path) -> None:
    lines = train(
        tiny_bert, tmp_path, "--curriculum.mixing=sequential", "--curriculum.order=[para,sts,sst]",
        "--evaluation.every=phase",
    )  # fmt: skip
    evaluations = [(line["step"], line.get("phase")) for line in lines if line["kind"] == "evaluation"]
    assert evaluations == [(4, "para"), (8, "sts"), (12, "sst")]
    assert "# Forgetting" in (tmp_path / "run" / "report.md").read_text()


def test_learned_task_weights_move_and_the_run_can_be_read_again(tiny_bert: Path, tmp_path: Path) -> None:
    from mtbert.cli import config_from_file
    from mtbert.engine.load_run import load_run
    from mtbert.engine.run_folder import RunFolder

    lines = train(tiny_bert, tmp_path, "--surgery.method=uncertainty", "--optim.uncertainty_lr=0.1")
    weights = [line["weights"] for line in lines if line["kind"] == "step"]
    assert [set(found) for found in weights] == [{"sst", "para", "sts"}] * 2
    assert weights[0]["sst"] == pytest.approx(1, abs=0.1)  # of the first two steps
    assert weights[0]["sts"] == pytest.approx(0.5, abs=0.05)
    assert all(abs(weights[1][task] - weights[0][task]) > 1e-3 for task in weights[0])
    assert "# Learned weights" in (tmp_path / "run" / "report.md").read_text()
    assert (tmp_path / "run" / "plots" / "weights.png").stat().st_size > 1000
    run = RunFolder.open(tmp_path / "run")
    model = load_run(run, config_from_file(run.config_path)).model
    assert model.uncertainty.log_variance.abs().max() > 0.01


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--simcse.tasks=[cola]"], "simcse.tasks"),
        (["--mnrl.tasks=[sst]"], "mnrl.tasks"),
        (["--triplet.tasks=[sts]"], "triplet.tasks"),
        (["--smart.epsilon=-1"], "smart.epsilon"),
        (["--smart.tasks=[sst]", "--mode=last-linear-layer"], "smart.tasks"),
        (["--simcse.tasks=[sst]", "--sst.batch_size=1"], "batch_size"),
        (["--simcse.temperature=0"], "simcse.temperature"),
        (["--bregman.momentum=1"], "bregman.momentum"),
        (["--mixout.p=1"], "mixout.p"),
        (["--curriculum.order=[sst,cola,para]"], "curriculum.order"),
        (["--curriculum.start={cola: 1}"], "curriculum.start"),
        (["--model.attention_heads=5"], "attention_heads"),
        (["--model.pool_layer=99"], "pool_layer"),
        (["--model.extra_hidden.depth=6"], "extra_hidden.depth"),
        (["--model.pals.size=25"], "pals.size"),
        (["--mode=lora", "--model.lora.layers=[7]"], "lora.layers"),
        (["--sts.sampling=class-balanced"], "sts.sampling"),
        (["--sst.train_fraction=0"], "train_fraction"),
        (["--pretraining.mlm_probability=1.5"], "pretraining.mlm_probability"),
        (["--pretraining.task=cola"], "pretraining.task"),
        (["--sst.loss.weight=0", "--para.loss.weight=0", "--sts.loss.weight=0"], "loss.weight"),
        (["--sts.loss.weight=0", "--cosine_embedding.tasks=[sts]"], "sts.loss.weight"),
        (
            [
                "--sts.loss.weight=0",
                "--cosine_embedding.tasks=[sts]",
                "--sts.head={pair: [cosine], pooling: cls}",
            ],
            "sts.head.pooling",
        ),
        (["--unfreezing.gradual=true", "--mode=lora"], "unfreezing.gradual"),
        (["--unfreezing.heads_first=3"], "unfreezing.heads_first"),
        (
            ["--surgery.method=pcgrad", "--curriculum.mixing=sequential"],
            "surgery.method: pcgrad needs the gradients",
        ),
        (["--surgery.method=pcgrad", "--mode=last-linear-layer"], "surgery.method: pcgrad combines"),
        (["--surgery.method=pcgrad", "--tasks=[sst]"], "surgery.method: pcgrad needs several tasks"),
        (["--surgery.gradients=per-task"], "surgery.gradients"),
        (["--simcse.tasks=[sst]", "--model.dropout={embedding: 0, attention: 0, hidden: 0}"], "simcse.tasks"),
        (["--mnrl.tasks=[para]", "--max_tokens=64"], "max_tokens: mnrl needs 2"),
        (["--pretraining.task=para", "--para.loss.class_weights=[1,2,3]"], "para.loss.class_weights"),
        (
            ["--tasks=[sst]", "--pretraining.task=para", "--para.loss.class_weights=[1,2,3]"],
            "para.loss.class_weights",
        ),
        (["--optim.layer_decay=0.9", "--mode=last-linear-layer"], "optim.layer_decay"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run_begins(
    tiny_bert: Path, tmp_path: Path, options: list[str], field: str
) -> None:
    with pytest.raises(ConfigError, match=field.replace(".", r"\.")):
        train(tiny_bert, tmp_path, *options)
    assert not (tmp_path / "run" / "config.yaml").exists()
