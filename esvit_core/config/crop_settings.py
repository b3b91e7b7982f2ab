"""The sections for crops, augmentation and mixup."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from esvit_core.config.section import ADDED, Section


class CropConfig(Section):
    """A kind of crop."""

    size: int = Field(gt=0, description="Side of a crop, pixels.")
    number: int = Field(ge=0, description="Number of crops per image.")
    scale: tuple[float, float] = Field(
        description="Range of the area of a crop as a fraction of the image: minimum, maximum."
    )


class DeitConfig(Section):
    """Augmentation with `augment.policy: deit`, in place of colour jitter, blur and solarisation."""

    rand_augment: str = Field(
        "rand-m9-mstd0.5-inc1", pattern=r"^rand(-[a-z]+[0-9.]+)*$", description="RandAugment policy in timm's notation."
    )
    erase: float = Field(0.25, ge=0, le=1, description="Probability of random erasing.")
    erase_mode: Literal["const", "rand", "pixel"] = Field(
        "pixel",
        description="Fill of an erased box. const: grey, rand: one random colour, pixel: a random colour per pixel.",
    )
    erase_count: int = Field(1, gt=0, description="Maximum number of erased boxes.")
    interpolation: Literal["bicubic", "bilinear", "random"] = Field("bicubic", description="Interpolation of crops.")


def _one_or_list(value: Any) -> str:
    return "[list]" if isinstance(value, (list, tuple)) else "[one]"


class AugmentConfig(Section):
    """Multi-crop augmentation (EsViT, appendix A.1; DINO's)."""

    policy: Literal["dino", "deit"] = Field(
        "dino",
        description="dino: DINO's, with the settings from `jitter` on. deit: RandAugment and random erasing, crops of at least 8 % of the image.",
    )
    global_crops: CropConfig = CropConfig(size=224, number=2, scale=(0.4, 1.0))
    local_crops: Annotated[
        Annotated[CropConfig, Tag("[one]")] | Annotated[tuple[CropConfig, ...], Tag("[list]")],
        Discriminator(_one_or_list),
    ] = Field(
        CropConfig(size=96, number=8, scale=(0.05, 0.4)),
        description="A kind of crop, or a list of kinds. List kinds of equal size next to each other: they are computed together.",
    )
    deit: DeitConfig = DeitConfig()
    flip: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    rotate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Probability of turning a crop by 90, 180 or 270 degrees, for images without an up; policy dino only.",
        json_schema_extra=ADDED,
    )
    jitter: float = Field(0.8, ge=0, le=1, description="Probability of colour jitter.")
    brightness: float = Field(0.4, ge=0, description="Strength of brightness jitter.")
    contrast: float = Field(0.4, ge=0, description="Strength of contrast jitter.")
    saturation: float = Field(0.2, ge=0, description="Strength of saturation jitter.")
    hue: float = Field(0.1, ge=0, le=0.5, description="Strength of hue jitter.")
    grayscale: float = Field(0.2, ge=0, le=1, description="Probability of conversion to greyscale.")
    blur: tuple[float, float, float] = Field(
        (1.0, 0.1, 0.5), description="Probability of Gaussian blur: first global crop, second global crop, local crops."
    )
    blur_sigma: tuple[float, float] = Field(
        (0.1, 2.0), description="Range of the standard deviation of the blur, pixels."
    )
    solarize: float = Field(0.2, ge=0, le=1, description="Probability of solarising the second global crop.")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="Mean of each channel, subtracted.")
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225), description="Standard deviation of each channel, divided by."
    )

    @property
    def local_kinds(self) -> tuple[CropConfig, ...]:
        """The kinds of local crops, as a tuple."""
        return (self.local_crops,) if isinstance(self.local_crops, CropConfig) else self.local_crops

    @property
    def crop_sizes(self) -> list[int]:
        """The size of each crop of an image in training, pixels; the two global crops first."""
        return [kind.size for kind in (self.global_crops, *self.local_kinds) for _ in range(kind.number)]

    @model_validator(mode="before")
    @classmethod
    def _complete_crops(cls, given: Any) -> Any:
        """Fill in the defaults of the policy, so that `local_crops: {number: 4}` is enough."""
        if not isinstance(given, dict):
            return given
        values = dict(given)
        for name in ("global_crops", "local_crops"):
            crops = cls.model_fields[name].default.model_dump()
            if values.get("policy") == "deit":  # the published transform keeps timm's scale
                crops["scale"] = (0.08, 1.0)
            match values.setdefault(name, {}):
                case dict() as kind:
                    values[name] = crops | kind
                case list() | tuple() as kinds:
                    scale = {"scale": crops["scale"]}
                    values[name] = [scale | kind if isinstance(kind, dict) else kind for kind in kinds]
        return values

    @model_validator(mode="after")
    def _two_global_crops(self) -> Self:
        if self.global_crops.number != 2:
            raise ValueError(
                f"global_crops.number: expected 2, which the objective compares, got {self.global_crops.number}"
            )
        return self


class MixupConfig(Section):
    """Mixup and CutMix of the student's crops (Zhang et al., 2018; Yun et al., 2019), for the view task only."""

    use: bool = Field(False, description="Mix the images of a process with each other, crop by crop.")
    crops: int = Field(10, ge=0, description="Number of crops to mix, counted from the first.")
    mixup_alpha: float = Field(0.8, ge=0, description="Alpha of the beta distribution of mixup. 0: no mixup.")
    cutmix_alpha: float = Field(1.0, ge=0, description="Alpha of the beta distribution of CutMix. 0: no CutMix.")
    cutmix_minmax: tuple[float, float] | None = Field(
        None,
        description="Minimum and maximum side of the CutMix box as a fraction of the crop. null: from the beta distribution.",
    )
    prob: float = Field(1.0, ge=0, le=1, description="Probability of mixing.")
    switch_prob: float = Field(
        0.5, ge=0, le=1, description="Probability of CutMix where both mixup and CutMix are enabled."
    )
    mode: Literal["batch", "pair", "elem"] = Field(
        "batch", description="What shares a mixing ratio: the batch, a pair of images, or a single image."
    )
    smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing of the targets.")
    clean_teacher: bool = Field(
        False, description="Feed the teacher the unmixed images; the published code feeds it the mixed ones."
    )

    @model_validator(mode="after")
    def _something_to_mix(self) -> Self:
        if self.use and not (self.mixup_alpha or self.cutmix_alpha or self.cutmix_minmax):
            raise ValueError("expected mixup_alpha or cutmix_alpha above 0, or cutmix_minmax")
        if self.cutmix_minmax and not 0 <= self.cutmix_minmax[0] < self.cutmix_minmax[1] <= 1:
            raise ValueError(f"cutmix_minmax: expected 0 <= minimum < maximum <= 1, got {self.cutmix_minmax}")
        return self
