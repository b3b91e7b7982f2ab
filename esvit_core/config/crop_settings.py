"""The sections that say what a network sees of an image: crops, augmentation, mixing."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from esvit_core.config.section import Section


class CropConfig(Section):
    """One kind of crop."""

    size: int = Field(gt=0, description="Side of the crop, pixels.")
    number: int = Field(ge=0, description="Crops of this kind per image.")
    scale: tuple[float, float] = Field(description="Area of the crop as a share of the image's, smallest and largest.")


class DeitConfig(Section):
    """What `augment.policy: deit` does to a crop instead of colour jitter, blur and solarisation."""

    rand_augment: str = Field(
        "rand-m9-mstd0.5-inc1", pattern=r"^rand(-[a-z]+[0-9.]+)*$", description="RandAugment, as timm writes it."
    )
    erase: float = Field(0.25, ge=0, le=1, description="Probability of random erasing.")
    erase_mode: Literal["const", "rand", "pixel"] = Field(
        "pixel", description="Erased pixels become: grey, one random colour, random colours."
    )
    erase_count: int = Field(1, gt=0, description="Boxes erased at most.")
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"


def _one_or_list(value: Any) -> str:
    return "[list]" if isinstance(value, (list, tuple)) else "[one]"


class AugmentConfig(Section):
    """Multi-crop augmentation (EsViT, appendix A.1; DINO's)."""

    policy: Literal["dino", "deit"] = Field(
        "dino", description="dino: the keys from `jitter` on; deit: RandAugment and random erasing, crops from 8 %."
    )
    global_crops: CropConfig = CropConfig(size=224, number=2, scale=(0.4, 1.0))
    local_crops: Annotated[
        Annotated[CropConfig, Tag("[one]")] | Annotated[tuple[CropConfig, ...], Tag("[list]")],
        Discriminator(_one_or_list),
    ] = Field(
        CropConfig(size=96, number=8, scale=(0.05, 0.4)),
        description="One kind of crop, or a list of kinds; kinds of one size stand side by side for speed.",
    )
    deit: DeitConfig = DeitConfig()
    flip: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    jitter: float = Field(0.8, ge=0, le=1, description="Probability of colour jitter.")
    brightness: float = Field(0.4, ge=0)
    contrast: float = Field(0.4, ge=0)
    saturation: float = Field(0.2, ge=0)
    hue: float = Field(0.1, ge=0, le=0.5)
    grayscale: float = Field(0.2, ge=0, le=1, description="Probability of losing the colour.")
    blur: tuple[float, float, float] = Field(
        (1.0, 0.1, 0.5), description="Probability of Gaussian blur: first global crop, second, local."
    )
    blur_sigma: tuple[float, float] = Field((0.1, 2.0), description="Standard deviation of the blur, pixels.")
    solarize: float = Field(0.2, ge=0, le=1, description="Probability of solarising the second global crop.")
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @property
    def local_kinds(self) -> tuple[CropConfig, ...]:
        """The kinds of local crops, one or more."""
        return (self.local_crops,) if isinstance(self.local_crops, CropConfig) else self.local_crops

    @model_validator(mode="before")
    @classmethod
    def _complete_crops(cls, given: Any) -> Any:
        """Take from the policy's crops what a recipe leaves out: `local_crops: {number: 4}` is enough."""
        if not isinstance(given, dict):
            return given
        values = dict(given)
        for name in ("global_crops", "local_crops"):
            crops = cls.model_fields[name].default.model_dump()
            if values.get("policy") == "deit":  # the published transform leaves timm's scale as it is
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
            raise ValueError(f"global_crops.number: the objective compares two, got {self.global_crops.number}")
        return self


class MixupConfig(Section):
    """Mixup and CutMix of the student's images (Zhang et al., 2018; Yun et al., 2019); view-only runs."""

    use: bool = Field(False, description="Mix the images of a process with each other, crop by crop.")
    crops: int = Field(10, ge=0, description="How many crops, counted from the first, are mixed.")
    mixup_alpha: float = Field(0.8, ge=0, description="Of mixup's beta distribution; 0: no mixup.")
    cutmix_alpha: float = Field(1.0, ge=0, description="Of CutMix's beta distribution; 0: no CutMix.")
    cutmix_minmax: tuple[float, float] | None = Field(
        None, description="Sides of CutMix's box as shares of the crop's, instead of the beta distribution."
    )
    prob: float = Field(1.0, ge=0, le=1, description="Probability of mixing.")
    switch_prob: float = Field(0.5, ge=0, le=1, description="Probability of CutMix where both are possible.")
    mode: Literal["batch", "pair", "elem"] = Field("batch", description="What shares a mixing ratio.")
    smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing of the targets.")
    clean_teacher: bool = Field(
        False, description="Show the teacher the unmixed images; the published code shows it the mixed ones."
    )

    @model_validator(mode="after")
    def _something_to_mix(self) -> Self:
        if self.use and not (self.mixup_alpha or self.cutmix_alpha or self.cutmix_minmax):
            raise ValueError("mixup_alpha or cutmix_alpha must be above 0, or cutmix_minmax given")
        if self.cutmix_minmax and not 0 <= self.cutmix_minmax[0] < self.cutmix_minmax[1] <= 1:
            raise ValueError(f"cutmix_minmax must rise between 0 and 1, got {self.cutmix_minmax}")
        return self
