"""Images of more than 8 bits, with other bands, or of optional formats: one scale for a source, and nothing lost silently."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from esvit_core.config import DataConfig
from esvit_core.data.ingest import optional_formats
from esvit_core.data.ingest.decode import BadImage, StoredImage, to_stored_image
from esvit_core.data.ingest.inspect_source import inspect_source
from esvit_core.data.ingest.pixels import PixelSettings, usual_scale
from esvit_core.data.shards.reader import ShardDataset, decode_image


def ramp(high: float, kind: str, low: float = 0, size: int = 32) -> np.ndarray:
    """Return (size, size) values from low to high."""
    return np.linspace(low, high, size * size).reshape(size, size).astype(kind)


def tiff(values: np.ndarray, **options) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    content = io.BytesIO()
    tifffile.imwrite(content, values, **options)
    return content.getvalue()


def stored(data: bytes, ending: str = "", **settings) -> tuple[np.ndarray, StoredImage]:
    config = DataConfig(**settings)
    found = to_stored_image(data, 1.0, None, 100.0, pixels=PixelSettings.of(config), ending=ending)
    return decode_image(found.data), found


def images_of(store, at: str = "data") -> dict[str, np.ndarray]:
    data = ShardDataset(store, store.uri(at), "train")
    return {data.name(i): data.image(i) for i in range(len(data))}


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize(("bits", "highest"), [(10, 1000), (12, 4000), (16, 65000), (8, 200)])
def test_sixteen_bit_files_are_scaled_by_the_bits_that_the_source_uses(
    store, prepared, make, tmp_path, bits, highest, form
):
    dim, full = ramp(highest / 4, "uint16"), ramp(highest, "uint16")
    files = {f"{i}.{form.lower()}": make.file(values, form) for i, values in enumerate([dim, full, full])}
    manifest = prepared(make.folder(tmp_path / "x", files), val_fraction=0)
    assert manifest.intensity == {"16-bit": (0, 2**bits - 1)}
    found = images_of(store)
    ratio = found[f"1.{form.lower()}"].mean() / found[f"0.{form.lower()}"].mean()
    assert 3.7 < ratio < 4.3, "brightness must stay comparable between images"
    assert found[f"1.{form.lower()}"].max() > 190
    assert any("intensity: 16-bit images are scaled" in line for line in manifest.reading)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 0.9, (0, 1)),
        (0, 1.02, (0, 1)),
        (-1, 1, (-1, 1)),
        (0, 240.5, (0, 255)),
        (0, 60000, (0, 65535)),
        (0, 8.5, (0, 8.5)),
        (-40, 900, (-40, 900)),
    ],
)
def test_floating_point_is_scaled_by_the_range_of_the_source(low, high, expected):
    assert usual_scale("float", low, high) == expected


def test_whole_numbers_of_32_bits(store, prepared, make, tmp_path):
    files = {f"{i}.tif": make.file(ramp(100_000, "int32"), "TIFF") for i in range(2)}
    assert prepared(make.folder(tmp_path / "x", files), val_fraction=0).intensity == {"32-bit": (0, 2**17 - 1)}
    assert 170 < images_of(store)["0.tif"].max() < 200


def test_the_intensity_can_be_set(store, prepared, make, tmp_path):
    folder = make.folder(tmp_path / "x", {"0.tif": make.file(ramp(4000, "uint16"), "TIFF"), "1.png": make.file(1)})
    manifest = prepared(folder, val_fraction=0, intensity="1000..2000")
    assert manifest.intensity == {} and manifest.settings["intensity"] == "1000..2000"
    values = images_of(store)["0.tif"].astype(int)[..., 0].ravel()
    assert (values == 0).mean() > 0.24 and (values == 255).mean() > 0.49
    assert np.array_equal(images_of(store)["1.png"], make.pixels(1)), "8-bit images are not scaled"


@pytest.mark.parametrize("value", ["4095", "5..1", "a..b", "0..4095.."])
def test_a_wrong_intensity_is_refused(value):
    with pytest.raises(ValidationError):
        DataConfig(intensity=value)


def test_new_images_are_scaled_like_the_earlier_ones(store, prepared, make, tmp_path):
    from esvit_core.data.ingest.prepare import prepare

    folder = make.folder(tmp_path / "x", {f"{i}.tif": make.file(ramp(4000, "uint16"), "TIFF") for i in range(3)})
    prepared(folder, val_fraction=0)
    make.folder(folder, {"new.tif": make.file(ramp(1000, "uint16"), "TIFF")})
    grown = prepare(str(folder), store, store.uri("grown"), DataConfig(val_fraction=0), base=store.uri("data"))
    assert grown.intensity == {"16-bit": (0, 4095)} and images_of(store, "grown")["new.tif"].max() < 70


def test_pixels_without_a_measurement_are_black_and_do_not_count(store, prepared, make, tmp_path):
    values = ramp(900, "uint16")
    values[:4] = 65535
    nodata = [(42113, "s", 0, "65535", True)]
    folder = make.folder(tmp_path / "x", {f"{i}.tif": tiff(values, extratags=nodata) for i in range(2)})
    assert prepared(folder, val_fraction=0).intensity == {"16-bit": (0, 1023)}
    assert (images_of(store)["0.tif"][:4] == 0).all()


def test_min_is_white(make):
    values = ramp(65535, "uint16")
    normal, inverted = stored(tiff(values))[0], stored(tiff(values, photometric="miniswhite"))[0]
    assert np.array_equal(normal, 255 - inverted) and normal[0, 0, 0] == 0


def test_color_of_sixteen_bits_and_floating_point(make):
    values = np.dstack([ramp(1, "float32"), np.zeros((32, 32), np.float32), np.full((32, 32), 0.5, np.float32)])
    for data in (tiff(values), tiff((values * 65535).astype(np.uint16))):
        image, _ = stored(data)
        assert image[0, 0].tolist() == [0, 0, 127] and image[-1, -1].tolist() == [255, 0, 127]


@pytest.mark.parametrize("layout", ["contig", "separate"])
def test_bands_are_chosen_by_their_numbers(layout):
    values = np.stack([np.full((20, 24), 40 * b, np.uint8) for b in range(1, 7)])  # six bands
    data = tiff(
        values if layout == "separate" else np.moveaxis(values, 0, -1), planarconfig=layout, photometric="minisblack"
    )
    image, found = stored(data)
    assert image[0, 0].tolist() == [40, 80, 120] and found.odd == ("bands",)
    image, found = stored(data, bands=(6, 4, 1))
    assert image[0, 0].tolist() == [240, 160, 40] and found.odd == ()
    assert stored(data, bands=(5,))[0][0, 0].tolist() == [200, 200, 200]
    with pytest.raises(BadImage, match=r"6 bands, and data\.bands names 7"):
        stored(data, bands=(7, 1, 1))


def test_bands_of_ordinary_images(make):
    image, _ = stored(make.file(3), bands=(3, 2, 1))
    assert np.array_equal(image, make.pixels(3)[..., ::-1])
    with pytest.raises(BadImage, match="1 band, and"):
        stored(make.file(make.pixels(3)[..., 0]), bands=(3, 2, 1))
    with pytest.raises(ValidationError, match="one or three"):
        DataConfig(bands=(1, 2))


def test_a_fourth_band_that_is_no_opacity_is_not_lost_silently():
    values = np.full((20, 24, 4), 90, np.uint8)
    image, found = stored(tiff(values, photometric="rgb", extrasamples=["unspecified"]))
    assert found.odd == ("bands",) and (image == 90).all()


def test_what_is_left_out_or_looks_empty_is_said_with_examples(prepared, make, tmp_path):
    frames = [Image.fromarray(make.pixels(i)) for i in range(3)]
    files = {f"{i}.png": make.file(i) for i in range(5)}
    files |= {"many.gif": make.file(frames[0], "GIF", save_all=True, append_images=frames[1:])}
    files |= {"pages.tif": make.file(frames[0], "TIFF", save_all=True, append_images=frames[1:])}
    files |= {"black.jpg": make.file(np.full((20, 24, 3), 9, np.uint8), "JPEG")}
    files |= {"white.png": make.file(np.full((20, 24, 3), 251, np.uint8))}
    lines = prepared(make.folder(tmp_path / "x", files), val_fraction=0).reading
    assert "odd: 2 of 9 images have several pages or frames, of which the first is used (many.gif, pages.tif)" in lines
    assert "odd: 1 of 9 images are nearly black; if that is wrong, set data.intensity (black.jpg)" in lines
    assert "odd: 1 of 9 images are nearly white; if that is wrong, set data.intensity (white.png)" in lines


def test_inspection_names_the_scale(make, tmp_path):
    make.folder(tmp_path / "x", {f"{i}.tif": make.file(ramp(4000, "uint16"), "TIFF") for i in range(2)})
    found = inspect_source(str(tmp_path / "x"), DataConfig())
    assert any("16-bit images are scaled from 0..4095" in line for line in found.lines)


@pytest.mark.parametrize(
    ("form", "package", "ending"), [("HEIF", "pillow_heif", ".heic"), ("JXL", "pillow_jxl", ".jxl")]
)
def test_optional_formats_are_read_where_their_package_is_installed(prepared, make, tmp_path, form, package, ending):
    pytest.importorskip(package)
    optional_formats.register_formats()
    data = make.file(make.pixels(1, 64, 48), form, quality=95)
    image, found = stored(data, ending)
    assert found.suffix == "jpg" and np.abs(image.astype(int) - make.pixels(1, 64, 48)).mean() < 10
    manifest = prepared(
        make.folder(tmp_path / "x", {f"{c}/{i}{ending}": data for c in ("cat", "dog") for i in range(2)}),
        val_fraction=0,
    )
    assert manifest.samples == 4 and manifest.classes == ["cat", "dog"] and manifest.bad.count == 0


def dicom(values: np.ndarray, **attributes) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    found = pydicom.Dataset()
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    found.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    found.SOPClassUID, found.SOPInstanceUID = SecondaryCaptureImageStorage, found.file_meta.MediaStorageSOPInstanceUID
    found.Rows, found.Columns, found.SamplesPerPixel = *values.shape, 1
    found.BitsAllocated, found.BitsStored, found.HighBit, found.PixelRepresentation = 16, 16, 15, 0
    found.PhotometricInterpretation = "MONOCHROME2"
    found.PixelData = values.tobytes()
    for name, value in attributes.items():
        setattr(found, name, value)
    content = io.BytesIO()
    found.save_as(content, enforce_file_format=True)
    return content.getvalue()


@pytest.mark.parametrize("name", ["{}.dcm", "IM{}"])
def test_dicom_files_are_read_in_their_own_units(store, prepared, make, tmp_path, name):
    data = dicom(ramp(2000, "uint16"), RescaleSlope=1, RescaleIntercept=-1000)
    folder = make.folder(tmp_path / "x", {name.format(i): data for i in range(2)})
    manifest = prepared(folder, val_fraction=0)
    assert list(manifest.intensity) == ["32-bit"] and manifest.bad.count == 0
    low, high = manifest.intensity["32-bit"]
    assert -1000 <= low < -990 and 990 < high <= 1000
    image = images_of(store)[name.format(0)]
    assert image.min() == 0 and image.max() == 255


def test_monochrome1_is_inverted():
    values = ramp(65535, "uint16")
    normal = stored(dicom(values))[0]
    assert np.array_equal(normal, 255 - stored(dicom(values, PhotometricInterpretation="MONOCHROME1"))[0])


def test_without_its_package_one_line_names_the_extra(make, tmp_path, monkeypatch):
    from esvit_core.data.ingest import file_kinds

    monkeypatch.setattr(optional_formats, "find_spec", lambda name: None)
    file_kinds._is_optional.cache_clear()
    try:
        folder = make.folder(tmp_path / "x", {"0.png": make.file(0), "1.heic": b"x", "2.psd": b"x", "3.nef": b"x"})
        bad = dict(inspect_source(str(folder), DataConfig()).bad)
    finally:
        file_kinds._is_optional.cache_clear()
    assert bad["1.heic"] == "no reader for .heic (install pillow-heif, or the extra esvit[formats])"
    assert bad["3.nef"].startswith("no reader for .nef (install rawpy")
    assert bad["2.psd"] == "no reader for .psd (convert it to JPEG, PNG or TIFF)"


def test_a_damaged_file_of_an_optional_format_is_a_bad_file(make):
    pytest.importorskip("rawpy")
    for ending in (".nef", ".heic", ".dcm"):
        with pytest.raises(BadImage):
            stored(b"II*\0" + bytes(200), ending)


def test_a_backbone_says_how_deep_images_were_read(store, prepared, make, tmp_path):
    folder = make.folder(tmp_path / "x", {f"{i}.tif": make.file(ramp(4000, "uint16"), "TIFF") for i in range(2)})
    prepared(folder, val_fraction=0)
    pixels = ShardDataset(store, store.uri("data"), "train").pixels
    assert json.loads(json.dumps(pixels)) == {"scales": {"16-bit": [0, 4095]}}
    prepared(make.folder(tmp_path / "y", {"0.png": make.file(0)}), at="plain", val_fraction=0)
    assert ShardDataset(store, store.uri("plain"), "train").pixels == {}
