"""The section for the evaluation of a backbone."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from esvit_core.config.section import ADDED, EXECUTION, Section

_FEW = re.compile(r"([0-9]+|[0-9]+\.[0-9]+(?=%))(%?)")


#: The layouts of the transfer sets of the paper, and the metric of each (EsViT, section 4.2; CLIP's linear-probe suite).
PUBLISHED_METRICS: dict[str, str] = {
    "food101": "accuracy",
    "cifar10": "accuracy",
    "cifar100": "accuracy",
    "sun397": "accuracy",
    "stanford-cars": "accuracy",
    "fgvc-aircraft": "mean_per_class",
    "voc2007": "map_11_point",
    "dtd": "accuracy",
    "pets": "mean_per_class",
    "caltech101": "mean_per_class",
    "flowers102": "mean_per_class",
    "mnist": "accuracy",
    "fer2013": "accuracy",
    "stl10": "accuracy",
    "gtsrb": "accuracy",
    "patch-camelyon": "accuracy",
    "ucf101": "accuracy",
    "hateful-memes": "roc_auc",
}


class TransferSet(Section):
    """A labelled data set for the transfer protocol.

    A source ``<layout>:<source>``, such as ``voc2007:VOCdevkit``, sets the layout, and the metric if that is not given.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$", description="Name in results and reports.")
    source: str = Field(
        description="Folder, tar, zip or s3://bucket/prefix with one folder per class; or <layout>:<source> for a set of "
        "the paper as it is distributed, such as voc2007:VOCdevkit."
    )
    layout: str | None = Field(
        None,
        description="Layout of a set of the paper, such as food101; null: one folder per class.",
        json_schema_extra=ADDED,
    )
    metric: Literal["accuracy", "mean_per_class", "map_11_point", "roc_auc"] = Field(
        "accuracy",
        description="Share of correct images, or its mean over the classes; 11-point mAP as in PASCAL VOC 2007; or the "
        "area under the ROC curve of two classes.",
    )

    @model_validator(mode="before")
    @classmethod
    def _layout_of_source(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("source"), str):
            return values
        layout, colon, source = values["source"].partition(":")
        if not colon or layout not in PUBLISHED_METRICS:
            return values
        return {"metric": PUBLISHED_METRICS[layout]} | values | {"layout": layout, "source": source}

    @field_validator("layout")
    @classmethod
    def _known_layout(cls, value: str | None) -> str | None:
        if value is not None and value not in PUBLISHED_METRICS:
            raise ValueError(f"layout: expected one of {', '.join(PUBLISHED_METRICS)}, got {value}")
        return value


class LinearConfig(Section):
    """The linear probe on frozen features."""

    protocol: Literal["grid", "published"] = Field(
        "grid",
        description="grid: feature and learning rate are chosen on validation images, on one pass of features; published: "
        "a random crop and flip of every image in every epoch, with the learning rate lr.",
    )
    epochs: int = Field(100, gt=0, description="Number of epochs.")
    lr: float = Field(0.001, gt=0, description="Learning rate of the published protocol per 256 images of the batch.")
    batch_size: int = Field(1024, gt=0, description="Batch size, images.")
    last_blocks: int = Field(4, gt=0, description="Number of last blocks whose averaged features are concatenated.")


class EvaluationConfig(Section):
    """The evaluation steps."""

    resize: int = Field(256, gt=0, description="Short side of an image before the center crop, pixels.")
    crop: int = Field(224, gt=0, description="Side of the center crop, pixels.")
    batch_size: int = Field(64, gt=0, description="Images per forward pass.", json_schema_extra=EXECUTION)
    knn_k: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (10, 20, 100, 200),
        description="Numbers of neighbours k; if there are fewer training images than k, all of them vote.",
    )
    knn_temperature: float = Field(0.07, gt=0, description="Temperature of the weights of the neighbours.")
    linear: LinearConfig = LinearConfig()
    transfer: tuple[TransferSet, ...] = Field((), description="Data sets for the transfer protocol.")
    few_shot: tuple[str, ...] = Field(
        (),
        description="Few-shot settings: images per class, such as 5, or a percentage of the training images, such as 10%; "
        "each is repeated with five seeds.",
        json_schema_extra=ADDED,
    )
    retrieval: bool = Field(
        False, description="Measure retrieval: mAP and R@k of the held-out images.", json_schema_extra=ADDED
    )
    segmentation: str | None = Field(
        None,
        description="Images with masks, on which a linear head on the regions is measured by mIoU: folder, tar, zip or "
        "s3://bucket/prefix. null: none.",
        json_schema_extra=ADDED,
    )
    visualization: int = Field(6, ge=0, description="Number of images in the correspondence and attention figures.")
    correspondence_images: int = Field(256, gt=0, description="Number of images on which correspondence is measured.")

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = [s.name for s in self.transfer]
        if len(set(names)) != len(names):
            raise ValueError(f"transfer: expected sets with distinct names, got {', '.join(names)}")
        return self

    @field_validator("few_shot", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return tuple(str(item) for item in value) if isinstance(value, (list, tuple)) else value

    @field_validator("few_shot")
    @classmethod
    def _possible_numbers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for item in value:
            found = _FEW.fullmatch(item)
            if found is None or not float(found[1]) > 0 or (found[2] and float(found[1]) > 100):
                raise ValueError(
                    f"few_shot: expected images per class, such as 5, or a percentage, such as 10%, got {item}"
                )
        return value

    @model_validator(mode="after")
    def _distinct_neighbours(self) -> Self:
        if len(set(self.knn_k)) != len(self.knn_k):
            raise ValueError(f"knn_k: expected distinct numbers, got {', '.join(map(str, self.knn_k))}")
        return self
