"""The configuration of a run: one typed tree, read from YAML, changed with ``--set a.b=c``.

A *recipe* is such a tree in a file. Those that ship with the library are in ``esvit_core/config/presets``;
every default below is the published ImageNet recipe (EsViT, section 4 and appendix A.1).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from esvit_core.config.cluster_settings import ClusterConfig as ClusterConfig
from esvit_core.config.crop_settings import AugmentConfig, MixupConfig
from esvit_core.config.crop_settings import CropConfig as CropConfig
from esvit_core.config.crop_settings import DeitConfig as DeitConfig
from esvit_core.config.evaluation_settings import EvaluationConfig
from esvit_core.config.evaluation_settings import LinearConfig as LinearConfig
from esvit_core.config.evaluation_settings import TransferSet as TransferSet
from esvit_core.config.launch_settings import LaunchConfig
from esvit_core.config.promotion_settings import PromotionConfig, RegistryConfig
from esvit_core.config.promotion_settings import RetrainConfig as RetrainConfig
from esvit_core.config.recipes import explain, override, parse_yaml, read_recipe
from esvit_core.config.section import EXECUTION, Section
from esvit_core.errors import UserError


class DataConfig(Section):
    """How images become shards."""

    max_images: int | None = Field(
        None,
        gt=0,
        description="Take at most this many images (a fixed, class-balanced choice; train and val together).",
    )
    shard_mib: float = Field(64.0, gt=0, description="Upper bound of a shard's size, MiB.")
    max_bad_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
        description="More unreadable images than this share is an error.",
        json_schema_extra=EXECUTION,
    )
    max_megapixels: float = Field(
        100.0, gt=0, description="Images with more pixels are left out (decompression bombs)."
    )
    store_short_side: int | None = Field(
        None, gt=0, description="Shrink images whose shorter side is longer than this before storing them, pixels."
    )
    val_fraction: float = Field(
        0.1, ge=0, lt=1, description="Share held out for evaluation where the source has no val/test folder of its own."
    )


class ModelConfig(Section):
    """The backbone. ``None`` means: what the named architecture has."""

    arch: str = Field(
        "swin_tiny_w7", description="Name of an architecture; `swin` alone takes every size from the keys below."
    )
    img_size: int | None = Field(
        None, gt=0, description="Side the network is built for, pixels; None: the global crop's."
    )
    patch_size: int | None = Field(None, gt=0)
    embed_dim: int | None = Field(None, gt=0)
    depths: tuple[int, ...] | None = None
    num_heads: tuple[int, ...] | None = None
    window_size: int | None = Field(None, gt=0)
    mode: Literal[-1, 0, 1] | None = Field(
        None, description="ViL's neighbouring windows in training: 1 a random one, 0 all eight, -1 none."
    )
    mode_switch: float = Field(
        1.0, ge=0, le=1, description="Share of the epochs after which mode 1 becomes 0; 1: never, as published."
    )
    stages: str | None = Field(None, description="Stages of `vil`, a string as the published MODEL.SPEC.MSVIT.ARCH.")
    drop_path: float = Field(0.1, ge=0, lt=1, description="Stochastic depth of the student; the teacher has none.")


class InitConfig(Section):
    """What a run starts from. Without a source the weights are drawn from the seed."""

    source: str | None = Field(
        None,
        description="`champion` or another pointer; s3://bucket/runs/<id>, or a published backbone or checkpoint there; "
        "a .pth or .safetensors file, here or in the store; a folder with a backbone; or `timm:<name>`.",
    )
    take: Literal["backbone", "heads", "all"] = Field(
        "backbone",
        description="backbone: the teacher's, into student and teacher; heads: both networks with their heads, and the "
        "centers; all: also the optimizer and the position.",
    )
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="Of what the source holds; filled in when the run is started."
    )


class HeadConfig(Section):
    """The projection heads, one for views and one for regions."""

    out_dim: int = Field(65536, gt=1, description="Number of prototypes K.")
    hidden_dim: int = Field(2048, gt=0)
    bottleneck_dim: int = Field(256, gt=0)
    norm_last_layer: bool = Field(False, description="Keep the prototypes' norms at one.")
    batch_norm: bool = Field(False, description="Batch norm after the two hidden layers, over all processes.")


class ObjectiveConfig(Section):
    """The objective (EsViT, equations 1 to 3)."""

    region: bool = Field(True, description="Add the region-level task; without it the run is view-only (DINO).")
    student_temp: float = Field(0.1, gt=0)
    warmup_teacher_temp: float = Field(0.04, gt=0)
    teacher_temp: float = Field(0.07, gt=0)
    warmup_teacher_temp_epochs: int = Field(30, ge=0)
    center_momentum: float = Field(0.9, ge=0, le=1)


class OptimizerConfig(Section):
    """The optimizer and the schedules."""

    name: Literal["adamw", "sgd", "lars"] = Field("adamw", description="SGD and LARS have momentum 0.9.")
    lr: float = Field(0.0005, gt=0, description="Peak learning rate per 256 images of global batch.")
    min_lr: float = Field(1e-6, ge=0)
    warmup_epochs: int = Field(10, ge=0)
    weight_decay: float = Field(0.04, ge=0)
    weight_decay_end: float = Field(0.4, ge=0)
    clip_grad: float = Field(3.0, ge=0, description="Norm at which each parameter's gradient is clipped; 0: never.")
    freeze_last_layer_epochs: int = Field(1, ge=0)
    teacher_momentum: float = Field(
        0.996, ge=0, le=1, description="Moving average of the teacher at the start; rises to 1."
    )


class TrainingConfig(Section):
    """How the run is carried out."""

    epochs: int = Field(300, gt=0)
    batch_size: int = Field(512, gt=0, description="Global batch: images per step over all processes.")
    processes: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="Processes on this machine; auto: one per GPU, else one per core up to 2.",
        json_schema_extra=EXECUTION,
    )
    max_images_per_process: int | None = Field(
        None,
        gt=1,
        description="Images that fit into a process at once; more are worked off in micro-batches. None: no bound.",
        json_schema_extra=EXECUTION,
    )
    workers: int = Field(
        0,
        ge=0,
        description="Data-loading processes per training process; 0: in the training process.",
        json_schema_extra=EXECUTION,
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Arithmetic of the networks; auto: bfloat16 where the processor or GPU computes it, else float32.",
    )
    deterministic: bool = Field(
        True, description="Bit for bit the same result for the same seed, processes and machine."
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="What a loss or gradient that is not finite leads to: the end of the run, the step left out, or the "
        "last checkpoint with a lower learning rate.",
    )
    nonfinite_limit: int = Field(
        5, ge=0, description="Steps within an epoch's length that may be skipped or lead back before the run stops."
    )
    rollback_lr: float = Field(0.5, gt=0, le=1, description="Factor of the learning rate each time that it leads back.")
    checkpoint_steps: int = Field(1000, gt=0, description="Steps between checkpoints.", json_schema_extra=EXECUTION)
    checkpoint_minutes: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="Minutes between checkpoints, whichever comes first; auto: 15, and in a step's own pod on a cluster "
        "so few that at most a minute of training is lost where the store keeps up.",
        json_schema_extra=EXECUTION,
    )
    checkpoint_epochs: int = Field(
        0,
        ge=0,
        description="Epochs after which there is a checkpoint too; 0: at no particular one.",
        json_schema_extra=EXECUTION,
    )
    keep_checkpoints: int = Field(3, gt=0, description="Newest checkpoints that stay.", json_schema_extra=EXECUTION)
    keep_epochs: int = Field(
        0, ge=0, description="One of every so many epochs, at its end, stays too; 0: none.", json_schema_extra=EXECUTION
    )
    keep_best: bool = Field(False, description="The one with the lowest loss stays too.", json_schema_extra=EXECUTION)
    store_grace_minutes: float = Field(
        10.0,
        ge=0,
        description="How long the object store may fail to answer before the training stops.",
        json_schema_extra=EXECUTION,
    )
    log_steps: int = Field(10, gt=0, description="Steps between lines of the log.", json_schema_extra=EXECUTION)
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of /metrics on this machine; 0: any free one; None: not served. In a pod of a cluster: 9400.",
        json_schema_extra=EXECUTION,
    )
    collapse_patience: int = Field(
        100,
        gt=0,
        description="Steps that the diagnostics may show a collapsed teacher before the run stops.",
        json_schema_extra=EXECUTION,
    )


class DiagnosticsConfig(Section):
    """How often student and teacher are looked at, and which figures are too low; what they are: training/diagnostics.py.

    A figure below its ``_warn`` for ``warn_after`` steps is told; one below its ``_stop`` for
    ``training.collapse_patience`` steps ends the run; null: never. Those without a bound of their own depend on the size
    of the batch.
    """

    steps: int | None = Field(
        None, gt=0, description="Steps between measurements, a multiple of training.log_steps; null: every log line."
    )
    warn_after: int = Field(50, ge=0, description="Steps that a figure may be too low before the run warns.")
    entropy_warn: float | None = Field(
        1.1, ge=0, description="Entropy of the teacher's mean distribution, nats; 1.1: three prototypes in use."
    )
    entropy_stop: float | None = Field(0.69, ge=0, description="Of the same; 0.69: two prototypes in use.")
    kl_warn: float | None = Field(
        0.03, ge=0, description="Divergence of the teacher's distributions from their mean, nats; 0: all are the same."
    )
    kl_stop: float | None = Field(0.01, ge=0)
    prototypes_warn: float | None = Field(None, ge=0, description="First choices of the teacher in a batch.")
    prototypes_stop: float | None = Field(None, ge=0)
    feature_std_warn: float | None = Field(0.03, ge=0, description="Spread of the teacher's view features, 0 to 1.")
    feature_std_stop: float | None = Field(0.01, ge=0)
    feature_rank_warn: float | None = Field(None, ge=0, description="Effective rank of the teacher's view features.")
    feature_rank_stop: float | None = Field(None, ge=0)
    mutual_matches_warn: float | None = Field(
        None, ge=0, le=1, description="Share of mutual matches; one in the regions of a crop when all are alike."
    )
    mutual_matches_stop: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _warns_before_it_stops(self) -> Self:
        for name in type(self).model_fields:
            warn, stop = getattr(self, name), getattr(self, name.replace("_warn", "_stop"), None)
            if name.endswith("_warn") and None not in (warn, stop) and warn < stop:
                raise ValueError(
                    f"{name} {warn:g}: expected at least {name.replace('_warn', '_stop')}, which is {stop:g}"
                )
        return self


class Config(Section):
    """Everything that determines a run."""

    recipe: str = Field("custom", description="Name shown in reports.")
    seed: int = Field(0, ge=0)
    bucket: str = Field("esvit", pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    mixup: MixupConfig = MixupConfig()
    model: ModelConfig = ModelConfig()
    init: InitConfig = InitConfig()
    head: HeadConfig = HeadConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    diagnostics: DiagnosticsConfig = Field(DiagnosticsConfig(), json_schema_extra=EXECUTION)
    evaluation: EvaluationConfig = EvaluationConfig()
    promotion: PromotionConfig = PromotionConfig()
    registry: RegistryConfig = Field(RegistryConfig(), json_schema_extra=EXECUTION)
    retrain: RetrainConfig = Field(RetrainConfig(), json_schema_extra=EXECUTION)
    cluster: ClusterConfig = Field(ClusterConfig(), json_schema_extra=EXECUTION)
    launch: LaunchConfig = Field(LaunchConfig(), json_schema_extra=EXECUTION)

    @model_validator(mode="after")
    def _mixup_is_view_only(self) -> Self:
        if self.mixup.use and self.objective.region:
            raise ValueError(
                "mixup.use goes with the view task only, regions of mixed images have no match; "
                "set objective.region to false"
            )
        return self

    @model_validator(mode="after")
    def _processes_have_accelerators(self) -> Self:
        wanted, there = self.launch.processes_per_node, self.cluster.train.accelerators
        if wanted and there and wanted > there:
            raise ValueError(
                f"launch.processes_per_node {wanted}: expected at most cluster.train.accelerators, which is {there}"
            )
        return self

    @property
    def node_processes(self) -> int:
        """Training processes of each pod of a job."""
        return self.launch.processes_per_node or max(1, self.cluster.train.accelerators)

    @model_validator(mode="after")
    def _diagnostics_have_a_line(self) -> Self:
        steps, log_steps = self.diagnostics.steps, self.training.log_steps
        if steps is not None and steps % log_steps:
            raise ValueError(
                f"diagnostics.steps {steps}: expected a multiple of training.log_steps, which is {log_steps}"
            )
        return self

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], origin: str = "configuration") -> Self:
        """Validate ``values``.

        Raises:
            UserError: a key is unknown (names the nearest valid one) or a value has the wrong type.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{origin}: {explain(error, list(valid_keys()))}") from None

    @classmethod
    def load(
        cls, recipe: str | Path, overrides: Iterable[str] = (), read: Callable[[str], bytes] | None = None
    ) -> Self:
        """Read a recipe and apply ``key=value`` overrides.

        Args:
            recipe: name of a preset (see :func:`preset_names`), path or ``s3://`` address of a YAML file, or YAML.
            overrides: such as ``"training.epochs=10"``; the value is read as YAML.
            read: returns what is at an ``s3://`` address.

        Raises:
            UserError: the recipe does not exist, is not YAML, or does not validate.
        """
        values, known = read_recipe(str(recipe), read), list(valid_keys())
        for item in overrides:
            override(values, item, known)
        return cls.from_mapping(values, origin=f"recipe {recipe}")

    def to_yaml(self) -> str:
        """The whole resolved tree as YAML; :meth:`from_yaml` reads it back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str, origin: str = "configuration") -> Self:
        return cls.from_mapping(parse_yaml(text, origin), origin)

    def digest(self) -> str:
        """SHA-256 of the settings that are part of a run's identity, hexadecimal."""
        return hashlib.sha256(json.dumps(self.identity_values(), sort_keys=True).encode()).hexdigest()

    def executed_as(self, execution: Mapping[str, Any]) -> Self:
        """The same run, executed in another way.

        Args:
            execution: of another configuration, see :meth:`Section.execution_values`.
        """
        return type(self).from_mapping(merged(self.identity_values(), execution))


def merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``more``, section by section."""
    both = {k: merged(base[k], v) for k, v in more.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **more, **both}


def valid_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in _sections(field.annotation):
            yield from valid_keys(section, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The section that a field holds, be it one of several kinds of value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, UnionType, Union):
        for kind in get_args(annotation):
            yield from _sections(kind)
