"""The configuration of a run: a typed tree, read from YAML and changed with ``--set a.b=c``.

A *recipe* is a YAML file with such a tree. The recipes that ship with the library are in ``esvit_core/config/presets``.
Every default below is the value of the published ImageNet recipe (EsViT, section 4 and appendix A.1).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

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
from esvit_core.config.section import ADDED, EXECUTION, Section
from esvit_core.config.training_settings import DiagnosticsConfig as DiagnosticsConfig
from esvit_core.config.training_settings import ObjectiveConfig as ObjectiveConfig
from esvit_core.config.training_settings import OptimizerConfig, TrainingConfig
from esvit_core.errors import UserError


class DataConfig(Section):
    """How images are prepared as shards."""

    max_images: int | None = Field(
        None,
        gt=0,
        description="Maximum number of images, train and val together; a fixed, class-balanced subset is used. null: all.",
    )
    shard_mib: float = Field(64.0, gt=0, description="Maximum size of a shard, MiB.")
    max_bad_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Maximum fraction of unreadable images; more than this is an error.",
        json_schema_extra=EXECUTION,
    )
    processes: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="Processes that check and convert images during the preparation. auto: one per core from 1,000 images "
        "on. 0: threads of the preparing process. The result is the same.",
        json_schema_extra=EXECUTION,
    )
    max_megapixels: float = Field(
        100.0, gt=0, description="Images with more megapixels are skipped (decompression bombs)."
    )
    max_aspect_ratio: float = Field(
        100.0,
        ge=1,
        description="Images whose longer side is more than so many times the shorter one are skipped.",
        json_schema_extra=ADDED,
    )
    store_short_side: int | None = Field(
        None,
        gt=0,
        description="Images with a longer short side are shrunk to it before they are stored, pixels. null: stored as is.",
    )
    val_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Fraction of the images held out for evaluation if the source has no val/ or test/ folder.",
    )
    labels: str = Field(
        "auto",
        pattern=r"^(auto|none|folder|csv|depth:[1-9])$",
        description="Where the classes come from. auto: from the folders, see docs/data.md; none: nowhere; folder: the "
        "folder of each image; depth:N: the Nth folder below the source or the split; csv: a table in the source.",
        json_schema_extra=ADDED,
    )
    splits: Literal["auto", "none"] | dict[str, Literal["train", "val", "test"]] = Field(
        "auto",
        description="Where the splits come from. auto: from folders named train, val, test and the like; none: nowhere, "
        "val_fraction is held out; or the split of each folder by name or pattern, such as {fold_0: val, 'fold_*': train}.",
        json_schema_extra=ADDED,
    )
    intensity: str = Field(
        "auto",
        pattern=r"^(auto|-?\d+(\.\d+)?\.\.-?\d+(\.\d+)?)$",
        description="Values that become black and white in images of more than 8 bits: LOW..HIGH, such as 0..4095. auto: one "
        "scale for the whole source, found from a sample and recorded.",
        json_schema_extra=ADDED,
    )
    bands: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        description="Bands that are used, from 1: three of them as red, green and blue, such as [4, 3, 2], or one. null: the "
        "first three.",
        json_schema_extra=ADDED,
    )
    drop_duplicates: Literal["none", "exact", "near"] = Field(
        "none",
        description="Images of which only the first is stored, training images first. exact: files with the same content; "
        "near: images that look alike, too (needs imagehash: the extra esvit[duplicates]).",
        json_schema_extra=ADDED,
    )
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None,
        min_length=1,
        description="How often an epoch of training takes an image of each source, for several --data in their order: [2, 1, "
        "0.5]. null: once.",
        json_schema_extra=ADDED,
    )

    @field_validator("intensity")
    @classmethod
    def _intensity_is_a_range(cls, value: str) -> str:
        if value != "auto" and float(value.partition("..")[0]) >= float(value.partition("..")[2]):
            raise ValueError("expected LOW..HIGH with LOW below HIGH")
        return value

    @field_validator("bands")
    @classmethod
    def _one_or_three_bands(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and len(value) not in (1, 3):
            raise ValueError("expected one or three numbers of bands")
        return value


class ModelConfig(Section):
    """The backbone. A null setting takes the value of the named architecture."""

    arch: str = Field(
        "swin_tiny_w7", description="Name of an architecture; `swin` takes all its sizes from the settings below."
    )
    img_size: int | None = Field(
        None, gt=0, description="Image size that the network is built for, pixels. null: the size of the global crops."
    )
    patch_size: int | None = Field(None, gt=0, description="Side of a patch, pixels.")
    embed_dim: int | None = Field(None, gt=0, description="Channels of the first stage.")
    depths: tuple[int, ...] | None = Field(None, description="Blocks per stage.")
    num_heads: tuple[int, ...] | None = Field(None, description="Attention heads per stage.")
    window_size: int | None = Field(None, gt=0, description="Side of an attention window, patches.")
    mode: Literal[-1, 0, 1] | None = Field(
        None,
        description="Neighbouring windows that ViL attends to in training: 1: a random one, 0: all eight, -1: none.",
    )
    mode_switch: float = Field(
        1.0, ge=0, le=1, description="Fraction of the epochs after which mode 1 switches to 0. 1: never, as published."
    )
    stages: str | None = Field(
        None, description="Stages of `vil`, in the format of the published MODEL.SPEC.MSVIT.ARCH."
    )
    drop_path: float = Field(0.1, ge=0, lt=1, description="Stochastic depth rate of the student; the teacher has none.")


class InitConfig(Section):
    """Initial weights. Without a source they are drawn from the seed."""

    source: str | None = Field(
        None,
        description="`champion` or another pointer; s3://bucket/runs/<id>, or a backbone or checkpoint below it; a .pth "
        "or .safetensors file on disk or in the store; a folder with a backbone; `timm:<name>`, or `timm:<name>:<file>` "
        "for a file with weights of timm's network.",
    )
    load: Literal["backbone", "heads", "all"] = Field(
        "backbone",
        description="backbone: load the teacher's backbone into student and teacher. heads: load both networks with "
        "their heads, and the centers. all: load the optimizer and the progress too.",
    )
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the weights; filled in when the run starts."
    )


class HeadConfig(Section):
    """The projection heads: one for views and one for regions."""

    out_dim: int = Field(65536, gt=1, description="Number of prototypes K.")
    hidden_dim: int = Field(2048, gt=0, description="Width of the hidden layers.")
    bottleneck_dim: int = Field(256, gt=0, description="Width of the last layer before the prototypes.")
    norm_last_layer: bool = Field(False, description="Fix the norms of the prototypes at 1.")
    batch_norm: bool = Field(
        False, description="Batch norm after the two hidden layers, synchronized over all processes."
    )


class Config(Section):
    """The configuration of a run."""

    recipe: str = Field("custom", description="Name of the recipe, shown in reports.")
    seed: int = Field(0, ge=0, description="Seed of all random numbers.")
    bucket: str = Field(
        "esvit", pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$", description="Bucket of the object store for the runs."
    )
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
                "mixup.use works with the view task only, because regions of mixed images have no match; "
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

    @model_validator(mode="after")
    def _accelerator_settings_have_an_effect(self) -> Self:
        launch, train = self.launch, self.cluster.train
        if launch.scheduler != "local" and not train.accelerators:
            given = {"launch.nccl": launch.nccl, "launch.allocator": launch.allocator}
            if idle := [name for name, value in given.items() if value]:
                raise ValueError(
                    f"{', '.join(idle)}: no effect without accelerators; set cluster.train.accelerators, or leave out"
                )
        if train.accelerator in launch.resources:
            raise ValueError(f"launch.resources {train.accelerator}: set by cluster.train.accelerators; leave out")
        return self

    @property
    def node_processes(self) -> int:
        """Training processes per pod of a job."""
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
        """Validate ``values`` and return the configuration.

        Raises:
            UserError: a key is unknown (the message names the nearest valid one) or a value is invalid.
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
            recipe: name of a preset (see :func:`preset_names`), path or ``s3://`` address of a YAML file, or YAML text.
            overrides: items such as ``"training.epochs=10"``; the value is parsed as YAML.
            read: function that returns the bytes at an ``s3://`` address.

        Raises:
            UserError: the recipe does not exist, is not YAML, or is invalid.
        """
        values, known = read_recipe(str(recipe), read), list(valid_keys())
        for item in overrides:
            override(values, item, known)
        return cls.from_mapping(values, origin=f"recipe {recipe}")

    def to_yaml(self) -> str:
        """Write the whole resolved tree as YAML; :meth:`from_yaml` reads it back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str, origin: str = "configuration") -> Self:
        return cls.from_mapping(parse_yaml(text, origin), origin)

    def digest(self) -> str:
        """SHA-256, hexadecimal, of the settings that are part of a run's identity."""
        return hashlib.sha256(json.dumps(self.identity_values(), sort_keys=True).encode()).hexdigest()

    def with_execution(self, execution: Mapping[str, Any]) -> Self:
        """Return the same run with other execution settings.

        Args:
            execution: the values of another configuration, see :meth:`Section.execution_values`.
        """
        return type(self).from_mapping(merge(self.identity_values(), execution))


def merge(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the values of ``more``, merged section by section."""
    both = {k: merge(base[k], v) for k, v in more.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **more, **both}


def valid_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of the tree, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in _sections(field.annotation):
            yield from valid_keys(section, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the sections among the types of a field."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, UnionType, Union):
        for kind in get_args(annotation):
            yield from _sections(kind)
