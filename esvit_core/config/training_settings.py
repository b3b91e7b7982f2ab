"""The sections for training: objective, optimizer, training loop and diagnostics."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from esvit_core.config.section import ADDED, EXECUTION, Section

WORKERS_PER_GPU = 6  # at most, with training.workers: auto; an assumption
PREFETCH_FACTOR = 2  # batches that each data-loading worker prepares in advance


class ObjectiveConfig(Section):
    """The objective (EsViT, equations 1 to 3)."""

    region: bool = Field(True, description="Train the region-level task too; false: view-level task only (DINO).")
    student_temp: float = Field(0.1, gt=0, description="Softmax temperature of the student.")
    warmup_teacher_temp: float = Field(0.04, gt=0, description="Initial softmax temperature of the teacher.")
    teacher_temp: float = Field(0.07, gt=0, description="Softmax temperature of the teacher after warm-up.")
    warmup_teacher_temp_epochs: int = Field(
        30, ge=0, description="Epochs over which the temperature of the teacher rises linearly."
    )
    center_momentum: float = Field(0.9, ge=0, le=1, description="Momentum of the moving average of the centers.")


class OptimizerConfig(Section):
    """The optimizer and its schedules."""

    name: Literal["adamw", "sgd", "lars"] = Field("adamw", description="Optimizer; SGD and LARS have momentum 0.9.")
    lr: float = Field(0.0005, gt=0, description="Peak learning rate per 256 images of the global batch.")
    min_lr: float = Field(1e-6, ge=0, description="Learning rate at the end of the cosine schedule.")
    warmup_epochs: int = Field(10, ge=0, description="Epochs of linear learning-rate warm-up.")
    weight_decay: float = Field(0.04, ge=0, description="Initial weight decay.")
    weight_decay_end: float = Field(0.4, ge=0, description="Weight decay at the end of the cosine schedule.")
    clip_grad: float = Field(3.0, ge=0, description="Maximum gradient norm of each parameter; 0: no clipping.")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Factor of the learning rate from each block to the one before it; the last block and the heads have "
        "the full rate. 1: the same rate for all.",
        json_schema_extra=ADDED,
    )
    freeze_backbone_epochs: int = Field(
        0,
        ge=0,
        description="Epochs in which only the heads are trained, so that random heads do not spoil initial weights.",
        json_schema_extra=ADDED,
    )
    freeze_last_layer_epochs: int = Field(1, ge=0, description="Epochs in which the prototypes are frozen.")
    teacher_momentum: float = Field(
        0.996, ge=0, le=1, description="Initial momentum of the teacher's moving average; it rises to 1."
    )


class TrainingConfig(Section):
    """The training loop."""

    epochs: int = Field(300, gt=0, description="Number of epochs.")
    batch_size: int = Field(512, gt=0, description="Global batch size: images per step over all processes.")
    processes: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="Training processes on this machine. auto: one per GPU, or without a GPU one per core, at most 2.",
        json_schema_extra=EXECUTION,
    )
    max_images_per_process: int | None = Field(
        None,
        gt=1,
        description="Maximum micro-batch: a process splits a larger share of the batch into micro-batches. null: no limit.",
        json_schema_extra=EXECUTION,
    )
    lazy_logits: bool | Literal["auto"] = Field(
        "auto",
        description="Compute the logits of a few images at a time instead of storing those of a micro-batch: the same loss up "
        "to rounding. auto: on a CPU from 16,384 prototypes on; on a GPU if they would take a tenth of its memory.",
        json_schema_extra=EXECUTION,
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="Compile the blocks of the networks with torch.compile, on a GPU: the same formulas up to rounding, in "
        "fewer kernels. It takes minutes at the first start. auto: where Triton can compile, for networks with linear layers "
        "that have no kernels of their own (Swin has) and whose batch norms do not communicate.",
        json_schema_extra=EXECUTION,
    )
    cuda_graphs: bool = Field(
        False,
        description="Replay the passes of the networks as CUDA graphs, so that a processor that launches kernels more slowly "
        "than the GPU runs them no longer holds it up. For one process without micro-batches.",
        json_schema_extra=EXECUTION,
    )
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="Data-loading worker processes per training process, and of an evaluation step. 0: load in the process "
        "itself. auto: 0 on a CPU; up to 6 for each GPU, as far as cores and shared memory suffice.",
        json_schema_extra=EXECUTION,
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Precision of the networks. auto: bfloat16 where the processor or GPU supports it natively, else float32.",
    )
    deterministic: bool = Field(
        True, description="Give bit-for-bit the same result for the same seed, number of processes and machine."
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="Reaction to a loss or gradient that is not finite. stop: end the run. skip: skip the step. rollback: "
        "return to the last checkpoint with a lower learning rate.",
    )
    nonfinite_limit: int = Field(
        5, ge=0, description="Maximum number of skips or rollbacks within the length of an epoch before the run stops."
    )
    rollback_lr: float = Field(
        0.5, gt=0, le=1, description="Factor by which each rollback multiplies the learning rate."
    )
    checkpoint_steps: int = Field(
        1000, gt=0, description="Maximum number of steps between checkpoints.", json_schema_extra=EXECUTION
    )
    checkpoint_minutes: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="Maximum time between checkpoints, minutes. auto: 15; in a step's own pod on a cluster short enough "
        "that a lost pod loses at most a minute of training, if the store keeps up.",
        json_schema_extra=EXECUTION,
    )
    checkpoint_epochs: int = Field(
        0,
        ge=0,
        description="Also write a checkpoint after every N epochs. 0: no such checkpoints.",
        json_schema_extra=EXECUTION,
    )
    keep_checkpoints: int = Field(
        3, gt=0, description="Number of most recent checkpoints to keep.", json_schema_extra=EXECUTION
    )
    keep_epochs: int = Field(
        0,
        ge=0,
        description="Also keep the checkpoint at the end of every N-th epoch. 0: none.",
        json_schema_extra=EXECUTION,
    )
    keep_best: bool = Field(
        False, description="Also keep the checkpoint with the lowest loss.", json_schema_extra=EXECUTION
    )
    store_grace_minutes: float = Field(
        10.0,
        ge=0,
        description="Minutes without an answer from the object store after which the training stops.",
        json_schema_extra=EXECUTION,
    )
    log_steps: int = Field(10, gt=0, description="Steps between log lines.", json_schema_extra=EXECUTION)
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of the /metrics endpoint. 0: any free port. null: no endpoint on this machine, 9400 in a pod.",
        json_schema_extra=EXECUTION,
    )
    collapse_patience: int = Field(
        100,
        gt=0,
        description="Steps that a diagnostic has to stay below its stop threshold before the run stops.",
        json_schema_extra=EXECUTION,
    )

    def largest_share(self, processes: int) -> int:
        """Return the images of a step in the process that has most of them."""
        return -(-self.batch_size // processes)

    def micro_batches(self, processes: int) -> int:
        """Return the number of micro-batches into which each process splits its share; the same in every process."""
        images = self.largest_share(processes)
        return -(-images // (self.max_images_per_process or images))

    def micro_batch(self, processes: int) -> int:
        """Return the images of the largest micro-batch."""
        return -(-self.largest_share(processes) // self.micro_batches(processes))


class DiagnosticsConfig(Section):
    """How often student and teacher are measured, and the thresholds of each figure (training/diagnostics.py).

    A figure below its ``_warn`` threshold for ``warn_after`` steps causes a warning. A figure below its ``_stop``
    threshold for ``training.collapse_patience`` steps ends the run. null: never. Thresholds that are null by default
    depend on the batch size.
    """

    steps: int | None = Field(
        None, gt=0, description="Steps between measurements, a multiple of training.log_steps. null: at every log line."
    )
    warn_after: int = Field(
        50, ge=0, description="Steps that a figure has to stay below its warn threshold before the run warns."
    )
    entropy_warn: float | None = Field(
        1.1, ge=0, description="Entropy of the teacher's mean distribution, nats. 1.1: three prototypes in use."
    )
    entropy_stop: float | None = Field(
        0.69, ge=0, description="Stop threshold of the entropy, nats. 0.69: two prototypes in use."
    )
    kl_warn: float | None = Field(
        0.03, ge=0, description="KL divergence of the teacher's distributions from their mean, nats. 0: all are equal."
    )
    kl_stop: float | None = Field(0.01, ge=0)
    prototypes_warn: float | None = Field(
        None, ge=0, description="Number of prototypes that are the teacher's first choice somewhere in a batch."
    )
    prototypes_stop: float | None = Field(None, ge=0)
    feature_std_warn: float | None = Field(
        0.03, ge=0, description="Standard deviation of the teacher's unit view features, 0 to 1."
    )
    feature_std_stop: float | None = Field(0.01, ge=0)
    feature_rank_warn: float | None = Field(None, ge=0, description="Effective rank of the teacher's view features.")
    feature_rank_stop: float | None = Field(None, ge=0)
    mutual_matches_warn: float | None = Field(
        None, ge=0, le=1, description="Fraction of mutual matches; 1 / regions of a crop when all regions are alike."
    )
    mutual_matches_stop: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _warn_thresholds_exceed_stop_thresholds(self) -> Self:
        for name in type(self).model_fields:
            warn, stop = getattr(self, name), getattr(self, name.replace("_warn", "_stop"), None)
            if name.endswith("_warn") and None not in (warn, stop) and warn < stop:
                raise ValueError(
                    f"{name} {warn:g}: expected at least {name.replace('_warn', '_stop')}, which is {stop:g}"
                )
        return self
