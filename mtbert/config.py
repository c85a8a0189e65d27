"""The whole configuration: joins the dataclasses that stand beside each component.

Every field can be set in YAML and on the command line; a run's `config.yaml` holds the resolved values and
reruns the same experiment.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from mtbert.curriculum import CurriculumConfig
from mtbert.engine.evaluator import EvaluationConfig
from mtbert.engine.frozen_prefix import FrozenCacheConfig
from mtbert.engine.graphs import Graphs
from mtbert.engine.input_pipeline import InputConfig
from mtbert.engine.precision import Precision
from mtbert.engine.pretraining import PretrainingConfig
from mtbert.engine.profiling import Profile, ProfilingConfig
from mtbert.engine.trainer import RunConfig
from mtbert.errors import ConfigError
from mtbert.losses.bregman import BregmanConfig
from mtbert.losses.cosine_embedding import CosineEmbeddingConfig
from mtbert.losses.mnrl import MnrlConfig
from mtbert.losses.simcse import SimCseConfig
from mtbert.losses.smart import SmartConfig
from mtbert.losses.triplet import TripletConfig
from mtbert.model.build import ModelConfig
from mtbert.model.checkpointing import CheckpointingConfig
from mtbert.model.multitask import MODE_ALIASES
from mtbert.optim.adamw import OptimizerConfig
from mtbert.optim.mixout import MixoutConfig
from mtbert.optim.schedule import ScheduleConfig
from mtbert.optim.surgery import SurgeryConfig
from mtbert.optim.unfreezing import UnfreezingConfig
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.extra_data import extra_files
from mtbert.tasks.registry import get_task

Mode = Literal["full", "last-linear-layer", "lora", "bitfit", "full-model", "finetune", "pretrain"]


@dataclass
class TrainConfig:
    """What a training run is a function of."""

    data: str = "sample"
    """A folder in the CS224N layout, `sample` (built-in synthetic sentences), `hub` (SST-5, QQP, STS-B), or `hub:DIR`
    (copies of those under DIR)."""
    output: str | None = None
    """The run's folder; by default a new one under runs/."""
    extra_data: list[str] = field(default_factory=list)
    """Further training tables as TASK=FILE, such as those of mtbert.augment: their rows join the task's training table,
    those that stand in dev or test are left out and reported. May be given several times."""
    tasks: list[str] = field(default_factory=lambda: ["sst", "para", "sts"])
    """The tasks to train together; round-robin takes turns in this order."""
    mode: Mode = "full"
    """full: everything trains; last-linear-layer: the heads, on cached features of the frozen encoder; lora:
    low-rank adapters and heads; bitfit: the encoder's biases and the heads. The course's names: pretrain, finetune
    and full-model."""
    epochs: float = 3
    """Passes over the curriculum's epoch; a part of an epoch is possible (0.5)."""
    seed: int = 0
    """Seed of initialisation, order and dropout."""
    seeds: int = 1
    """Runs with seeds seed, seed + 1, ...; more than one gives mean and deviation."""
    precision: Precision = "auto"
    """What the encoder computes in, over float32 weights: float32, tf32 (float32 multiplied as TF32 by a GPU), bf16,
    or fp16 (with a dynamic loss scale); auto: bf16 where the hardware multiplies it natively, else float32."""
    max_tokens: int = 4096
    """Token budget of one forward and backward pass (of a rank); a larger step takes several, with the same result."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; of several ranks each takes the GPU with its number on its machine."""
    threads: int = 0
    """CPU threads of a process; 0 leaves torch's choice, and shares a machine's cores among its ranks."""
    kernels: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Implementation of the encoder's operations; auto takes what should be fastest, cuda the CUDA extension where
    it has the operation, and Triton elsewhere."""
    compile: bool = False
    """torch.compile for what has no kernels of its own: the heads' layers, the tasks' losses, the loss of masked words.
    Needs a C++ compiler (on a GPU: Triton); what cannot be compiled runs as it is, with a warning."""
    graphs: Graphs = "never"
    """Capture whole training steps, and the passes of evaluations, in CUDA graphs, which spares their launches: auto,
    where it is possible; always, or fail with the reason; never. They are padded to fixed shapes then, which adds
    tokens (5.7% in preset minilm on the CS224N tables; the 1.9% of the steps that do not fit are taken one operation
    after the other) and rounds differently."""
    profile: Profile = "none"
    """nvtx: ranges for NVIDIA Nsight Systems; torch: a trace of some steps, and a section of the report that says where
    their time went. Neither changes what is computed, and with --resume it may be another than before."""
    cache: str | None = None
    """Folder of the tokenised tables, and of frozen layers' outputs; by default mtbert in the user's cache folder."""
    plugins: list[str] = field(default_factory=list)
    """Python files or modules that register tasks, imported at start-up."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The encoder, its dropout and its adapters."""
    frozen_cache: FrozenCacheConfig = field(default_factory=FrozenCacheConfig)
    """The outputs of frozen first layers, computed once and reused."""
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    """Gradient checkpointing: memory for time."""
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over time."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """How the tasks are mixed."""
    surgery: SurgeryConfig = field(default_factory=SurgeryConfig)
    """How the tasks' gradients are combined."""
    simcse: SimCseConfig = field(default_factory=SimCseConfig)
    """SimCSE, a contrastive objective."""
    mnrl: MnrlConfig = field(default_factory=MnrlConfig)
    """Multiple negatives ranking loss."""
    cosine_embedding: CosineEmbeddingConfig = field(default_factory=CosineEmbeddingConfig)
    """Cosine embedding loss."""
    triplet: TripletConfig = field(default_factory=TripletConfig)
    """Triplet loss."""
    smart: SmartConfig = field(default_factory=SmartConfig)
    """SMART, an adversarial smoothness regulariser."""
    bregman: BregmanConfig = field(default_factory=BregmanConfig)
    """Bregman proximal point optimisation with a momentum teacher."""
    mixout: MixoutConfig = field(default_factory=MixoutConfig)
    """Mixout of the encoder's weights with the pretrained ones."""
    unfreezing: UnfreezingConfig = field(default_factory=UnfreezingConfig)
    """Which layers train when."""
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    """Further pretraining before the run."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """When and on what to evaluate."""
    run: RunConfig = field(default_factory=RunConfig)
    """Logging and checkpoints."""
    input: InputConfig = field(default_factory=InputConfig)
    """How the input of a step is made ready."""
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    """Which steps profile torch records."""
    task: dict[str, TaskConfig] = field(default_factory=dict)
    """Settings of each task; groups named after the tasks in YAML and on the command line."""

    def __post_init__(self) -> None:
        self.mode = MODE_ALIASES.get(self.mode, self.mode)  # type: ignore[assignment]
        if not self.tasks:
            raise ConfigError("tasks: expected at least one task, found an empty list")
        repeated = sorted({name for name in self.tasks if self.tasks.count(name) > 1})
        if repeated:
            raise ConfigError(f"tasks: {', '.join(repeated)} is named more than once")
        unused = [name for name in extra_files(self.extra_data) if name not in tasks_with_settings(self)]
        if unused:
            raise ConfigError(
                f"extra_data: a table of {', '.join(unused)} would have no effect, because the run trains"
                f" {', '.join(tasks_with_settings(self))}"
            )
        for name in tasks_with_settings(self):
            get_task(name)
            self.task.setdefault(name, TaskConfig())
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ConfigError(f"epochs: expected a number above 0, found {self.epochs}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: expected 0 to 2**63 - 1, found {self.seed}")
        if self.seeds < 1:
            raise ConfigError(f"seeds: expected at least 1, found {self.seeds}")
        if self.threads < 0:
            raise ConfigError(f"threads: expected at least 0, found {self.threads}")
        for name in self.tasks:
            if not get_task(name).is_pair and self.task[name].head.pair != "cross-encoder":
                raise ConfigError(
                    f"{name}.head.pair: task {name} has single sentences, there is nothing to join"
                )
            rows = 2 if get_task(name).is_pair and self.task[name].head.pair != "cross-encoder" else 1
            needed = rows * self.task[name].max_length
            if self.max_tokens < needed:
                raise ConfigError(
                    f"max_tokens: an example of task {name} may take {needed} tokens"
                    f" ({name}.max_length {self.task[name].max_length}, {rows} row(s)), but one pass may hold"
                    f" {self.max_tokens}; raise max_tokens or lower {name}.max_length"
                )


def tasks_with_settings(config: TrainConfig) -> list[str]:
    """The tasks of the run, and the one that only a stage before it trains."""
    return list(
        dict.fromkeys([*config.tasks, *([config.pretraining.task] if config.pretraining.task else [])])
    )


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain values, each task's settings under the task's name; absent tasks left out."""
    values = dataclasses.asdict(config)
    tasks = values.pop("task")
    return values | {name: tasks[name] for name in tasks_with_settings(config)}


def to_yaml(config: TrainConfig) -> str:
    """The resolved configuration as YAML, in the order of the fields."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
