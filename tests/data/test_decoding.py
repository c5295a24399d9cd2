"""What becomes of an image file that can be read: channels, depth, transparency, orientation, size."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
from pictures import bomb, encoded, grey, photo, png
from PIL import Image, ImageOps

from dp_curriculum.data.decoding import MAX_IMAGE_PIXELS, PixelFormat, decode, describe


def pixels_of(data: bytes, num_channels: int = 1, resolution: int = 8, **conventions: Any) -> np.ndarray:
    pixels = decode(data, PixelFormat(resolution, num_channels, **conventions))
    assert pixels.dtype == np.uint8 and pixels.shape == (num_channels, resolution, resolution)
    return pixels


def test_grey_and_colour_are_converted_to_the_declared_channels() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert pixels_of(png(red), 3)[:, 0, 0].tolist() == [255, 0, 0]
    assert pixels_of(png(red), 1)[0, 0, 0] == 76, "ITU-R 601 luma of red"
    assert pixels_of(png(grey(40)), 3)[:, 0, 0].tolist() == [40, 40, 40]
    assert pixels_of(png(red.convert("P")), 3)[:, 0, 0].tolist() == [255, 0, 0]
    assert pixels_of(png(Image.new("1", (8, 8), 1)), 3)[:, 0, 0].tolist() == [255, 255, 255]
    cmyk = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")
    assert pixels_of(cmyk, 3)[:, 0, 0].tolist() == [255, 0, 0]


def transparent(mode: str) -> bytes:
    """A black square whose upper half is transparent."""
    alpha = np.repeat([0, 255], 32).reshape(8, 8).astype(np.uint8)
    if mode == "P":
        picture = Image.fromarray((alpha > 0).astype(np.uint8))
        picture.putpalette([9, 9, 9, 0, 0, 0])
        return png(picture, transparency=0)
    if mode in ("L", "RGB"):  # one colour stands for transparent
        picture = Image.fromarray(np.where(alpha > 0, 0, 9).astype(np.uint8)).convert(mode)
        return png(picture, transparency=9 if mode == "L" else (9, 9, 9))
    picture = Image.new(mode, (8, 8))
    picture.putalpha(Image.fromarray(alpha))
    return png(picture)


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("level", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_a_transparent_ground_has_the_declared_level(mode: str, level: float, num_channels: int) -> None:
    found = pixels_of(transparent(mode), num_channels, alpha_background=level)
    assert (found[:, :4] == round(255 * level)).all() and (found[:, 4:] == 0).all()


def test_half_transparent_pixels_are_mixed_with_the_ground_also_after_resizing() -> None:
    half = png(Image.new("RGBA", (32, 32), (255, 0, 0, 128)))
    found = pixels_of(half, 3, alpha_background=1.0)[:, 4, 4].astype(int)
    assert np.abs(found - [255, 127, 127]).max() <= 1


@pytest.mark.parametrize("num_channels", [1, 3])
def test_sixteen_bit_and_float_images_are_scaled_and_bounded(num_channels: int) -> None:
    deep = np.linspace(0, 65535, 64).reshape(8, 8)
    expected = np.round(deep / 257).astype(np.uint8)
    for data in (png(deep.astype(np.uint16)), encoded(Image.fromarray(deep.astype(np.int32)), "TIFF")):
        assert np.abs(pixels_of(data, num_channels)[0].astype(int) - expected).max() <= 1
    far = np.array([[-5.0, 0.0, 0.5, 1.0, 17.0, np.nan, np.inf, -np.inf]] * 8, dtype=np.float32)
    found = pixels_of(encoded(Image.fromarray(far), "TIFF"), num_channels)[0, 0].tolist()
    assert found == [0, 0, 128, 255, 255, 0, 255, 0]
    outside = np.array([[-70000, 70000] * 4] * 8, dtype=np.int32)
    assert pixels_of(encoded(Image.fromarray(outside), "TIFF"), num_channels)[0, 0, :2].tolist() == [0, 255]


def test_the_declared_range_is_what_black_and_white_are() -> None:
    """A scanner of 12 bits writes 0 to 4095 into 16: without the range, its images are nearly black."""
    twelve = np.linspace(0, 4095, 64).reshape(8, 8)
    data = png(twelve.astype(np.uint16))
    assert pixels_of(data).max() == 16
    found = pixels_of(data, intensity_range=(0.0, 4095.0))[0]
    assert np.abs(found.astype(int) - np.round(twelve / 4095 * 255)).max() <= 1
    hounsfield = Image.fromarray(np.array([[-1200, -1000, 0, 400] * 2] * 8, dtype=np.int32))
    found = pixels_of(encoded(hounsfield, "TIFF"), intensity_range=(-1000.0, 400.0))[0, 0, :4]
    assert found.tolist() == [0, 0, 182, 255]
    assert pixels_of(png(grey(7)), intensity_range=(0.0, 4095.0)).max() == 7, "8 bits are what they are"


def test_the_range_holds_for_every_pixel_of_an_image_that_is_read_in_strips() -> None:
    tall = np.tile(np.linspace(0, 65535, 4096).astype(np.uint16)[:, None], (1, 1024))
    found = pixels_of(png(tall), resolution=16)[0]
    assert (np.diff(found.astype(int), axis=0) > 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    picture = photo(24, "L")
    exif = Image.Exif()
    exif[0x0112] = orientation
    first = ImageOps.exif_transpose(Image.open(io.BytesIO(png(picture, exif=exif))))  # Pillow's own way, at full size
    expected = np.asarray(first.resize((8, 8), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(pixels_of(png(picture, exif=exif))[0] - expected).max() <= 2
    assert (orientation == 1) == (np.abs(pixels_of(png(picture))[0] - expected).max() <= 2)


def test_damaged_metadata_does_not_make_an_image_unreadable() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a worker hears none
        assert pixels_of(encoded(photo(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"), 3).std() > 10


def test_the_first_frame_of_an_animation_is_the_image() -> None:
    frames = [Image.fromarray(grey(value)) for value in (10, 200, 90)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels_of(data)[0, 0, 0] == 10


def test_other_sizes_are_cropped_to_the_middle_and_resized() -> None:
    wide = np.zeros((16, 48), dtype=np.uint8)
    wide[:, 16:32] = 255
    pixels = pixels_of(png(wide))[0]  # the filter looks a little beyond the crop
    assert (pixels[:, 1:-1] == 255).all() and pixels.min() > 200
    assert pixels_of(png(grey(7, size=3)), resolution=8)[0, 4, 4] == 7
    assert pixels_of(png(grey(7, size=1)), resolution=8)[0, 4, 4] == 7


@pytest.mark.parametrize("size", [97, 640])
def test_a_large_jpeg_that_is_decoded_at_a_fraction_is_the_same_picture(size: int) -> None:
    picture = photo(size)
    small = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)
    found = pixels_of(encoded(picture, "JPEG", quality=95), 3, resolution=16).astype(int)
    assert np.abs(found - small).mean() < 2 and np.abs(found - small).max() < 12


def test_a_large_image_below_the_limit_is_read_and_one_above_is_not() -> None:
    assert (pixels_of(bomb(2000)) == 0).all()
    with pytest.raises(ValueError, match="more than 50,000,000 pixels"):
        decode(bomb(int(MAX_IMAGE_PIXELS**0.5) + 1), PixelFormat(8, 1))


def test_the_owner_is_told_what_a_file_is() -> None:
    told = describe(encoded(photo(24, "CMYK"), "JPEG"))
    assert told == {"format": "JPEG", "mode": "CMYK", "width": 24, "height": 24}
