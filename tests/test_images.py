"""Reading any picture rightly, refusing what is not whole, and writing PNGs, grids and GIFs."""

from __future__ import annotations

import io
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ditcli.errors import UnreadableImageError
from ditcli.images import (
    fit_square,
    load_square,
    looks_like_picture,
    make_grid,
    read_image,
    read_png_metadata,
    write_gif,
    write_png,
)

REFUSED = {
    "Thumbs.db",
    "bitflips.jpg",  # its pixels end in the fifth row of blocks; the rest would be grey
    "half_truncated.jpg",
    "header_only.jpg",
    "html_error_page.png",
    "random_bytes.jpg",
    "text_named.jpg",
    "zero_byte.jpg",
    "zero_byte.png",
}


def scene(width: int = 48, height: int = 32) -> Image.Image:
    """A picture without symmetry, smooth enough for a JPEG."""
    y, x = np.mgrid[0:height, 0:width]
    channels = np.stack([x * 255 / width, y * 255 / height, 128 + 100 * np.sin(x / 9 + y / 5)], axis=-1)
    picture = Image.fromarray(channels.astype(np.uint8))
    ImageDraw.Draw(picture).rectangle((3, 2, 14, 7), fill=(250, 30, 20))
    return picture


def packed(picture: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def pixels(source: bytes | Path) -> np.ndarray:
    return np.asarray(read_image(source)).astype(int)


# --- modes


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "QOI", "JPEG2000"])
def test_lossless_formats_keep_every_pixel(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    assert (pixels(packed(scene(), format, **options)) == np.asarray(scene())).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_gives_the_upright_picture(format: str, orientation: int) -> None:
    # The inverse turns, from the table of the EXIF standard: what row 0 and column 0 of the stored picture show.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: np.rot90(a, -1),
    }[orientation](np.asarray(scene()))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    upright = pixels(packed(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options))
    assert upright.shape == (32, 48, 3)
    assert np.abs(upright - np.asarray(scene())).max() <= (6 if format == "JPEG" else 0)


def test_broken_exif_loses_no_picture() -> None:
    assert pixels(packed(scene(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).shape == (32, 48, 3)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_a_16_bit_ramp_is_scaled_not_clipped(format: str) -> None:
    ramp = np.linspace(0, 65535, 512, dtype=np.uint16).reshape(1, -1).repeat(4, axis=0)
    grey = pixels(packed(Image.fromarray(ramp), format))
    assert (grey == np.rint(ramp / 257)[..., None]).all()


def test_a_dark_16_bit_picture_stays_dark() -> None:
    dark = np.full((4, 4), 200, dtype=np.uint16)
    assert (pixels(packed(Image.fromarray(dark), "PNG")) == 1).all()


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_float_and_32_bit_ramps_are_scaled_by_their_usual_range(white: float) -> None:
    ramp = np.linspace(0, white, 256, dtype=np.float32).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16, 1)
    assert np.abs(pixels(packed(Image.fromarray(ramp), "TIFF")) - expected).max() == 0
    if white > 1:
        whole = packed(Image.fromarray(np.rint(ramp).astype(np.int32)), "TIFF")
        assert np.abs(pixels(whole) - expected).max() == 0


def test_floats_beyond_any_usual_range_are_stretched() -> None:
    values = np.array([[-3.0, np.nan, 7.0]], dtype=np.float32)  # nan counts as 0
    assert pixels(packed(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 76, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(mode: str) -> None:
    size = 16
    alpha = np.linspace(0, 255, size * size).astype(np.uint8).reshape(size, size)
    picture = scene(size, size).convert(mode[:-1])
    picture.putalpha(Image.fromarray(alpha))
    opaque = np.asarray(scene(size, size).convert(mode[:-1]).convert("RGB")).astype(float)
    share = alpha[..., None] / 255
    assert np.abs(pixels(packed(picture, "PNG")) - (opaque * share + 255 * (1 - share))).max() <= 1


@pytest.mark.parametrize("transparency", [0, b"\x00\xff\x80"])
def test_a_transparent_palette_colour_becomes_white(transparency: int | bytes) -> None:
    picture = Image.new("P", (3, 1))
    picture.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    picture.putdata([0, 1, 2])
    row = pixels(packed(picture, "PNG", transparency=transparency))[0]
    assert row[0].tolist() == [255, 255, 255]
    assert row[1].tolist() == [10, 200, 10]
    half = isinstance(transparency, bytes)
    assert np.abs(row[2] - ([132, 132, 227] if half else [10, 10, 200])).max() <= 1


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_grey_of_a_png_becomes_white(depth: int) -> None:
    grey = np.array([[7, 100]], dtype=np.uint8 if depth == 8 else np.uint16) * (1 if depth == 8 else 257)
    row = pixels(packed(Image.fromarray(grey), "PNG", transparency=int(grey[0, 0])))[0, :, 0]
    assert row.tolist() == [255, 100]


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_inks_subtract_from_white(format: str) -> None:
    inks = Image.new("CMYK", (32, 8))
    for i, ink in enumerate([(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)]):
        inks.paste(ink, (8 * i, 0, 8 * i + 8, 8))
    row = pixels(packed(inks, format, **({"quality": 100, "subsampling": 0} if format == "JPEG" else {})))[4, 4::8]
    expected = [[255, 255, 255], [0, 255, 255], [255, 0, 0], [0, 0, 0]]  # white, cyan, red, black
    assert np.abs(row - expected).max() <= 3


def test_lab_is_turned_into_srgb() -> None:
    # CIE L*a*b* (D50) of sRGB red is (54.3, 80.8, 69.9), with a and b in two's complement and L of 255.
    lab = np.array([[[255, 0, 0], [0, 0, 0], [138, 81, 70]]], dtype=np.uint8)
    row = pixels(packed(Image.frombytes("LAB", (3, 1), lab.tobytes()), "TIFF"))[0]
    assert np.abs(row - [[255, 255, 255], [0, 0, 0], [255, 0, 0]]).max() <= 6


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr"])
def test_other_modes_equal_pillows_conversion(mode: str) -> None:
    picture = scene().convert(mode)
    format = "TIFF" if mode == "YCbCr" else "PNG"
    assert (pixels(packed(picture, format)) == np.asarray(picture.convert("RGB"))).all()


def test_an_animation_gives_its_first_frame() -> None:
    frames = [scene(), scene().transpose(Image.Transpose.ROTATE_180)]
    data = packed(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert (pixels(data) == np.asarray(frames[0])).all()


# --- the square


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (33, 48), (32, 32)])
def test_a_square_of_the_same_size_is_a_crop_and_no_more(size: tuple[int, int]) -> None:
    picture = scene(*size)
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    cropped = np.asarray(picture)[top : top + side, left : left + side]
    assert (fit_square(picture, side) == cropped).all()


def test_shrinking_averages_instead_of_skipping_pixels() -> None:
    checks = np.indices((256, 256)).sum(axis=0) % 2 * 255
    picture = Image.fromarray(checks.astype(np.uint8)).convert("RGB")
    assert np.abs(fit_square(picture, 32).astype(int) - 127.5).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (7, 9), (2000, 300)])
def test_small_and_long_pictures_fit_any_square(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "a.png")
    for side in (1, 28, 64):
        square = load_square(tmp_path / "a.png", side)
        assert square.shape == (side, side, 3)
        assert square.dtype == np.uint8
        assert (square == (10, 200, 30)).all()


# --- what is whole and what is not


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_cut_jpeg_is_read_only_where_no_pixel_is_lost(mode: str, options: dict[str, object]) -> None:
    data = packed(scene().convert(mode), "JPEG", **options)
    whole = pixels(data)
    for missing in (1, 2):  # no more than the end marker
        assert (pixels(data[:-missing]) == whole).all()
    for length in range(0, len(data) - 4, 7):
        with pytest.raises(UnreadableImageError):
            read_image(data[:length])


def test_a_jpeg_whose_second_half_was_never_downloaded_is_refused() -> None:
    data = packed(scene(400, 300), "JPEG", quality=95)
    half = len(data) // 2
    with pytest.raises(UnreadableImageError, match="truncated"):
        read_image(data[:half] + bytes(len(data) - half))


def test_a_marker_among_the_pixels_is_damage() -> None:
    data = bytearray(packed(scene(400, 300), "JPEG"))
    data[-500:-498] = b"\xff\x01"
    with pytest.raises(UnreadableImageError, match="damaged at byte"):
        read_image(bytes(data))


def test_bytes_after_the_end_do_no_harm() -> None:
    for format in ("JPEG", "PNG"):
        data = packed(scene(), format)
        assert (pixels(data + b"\xff\xd8 and so on") == pixels(data)).all()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM"])
def test_half_a_file_is_refused(format: str) -> None:
    data = packed(scene(), format)
    with pytest.raises(UnreadableImageError):
        read_image(data[: len(data) // 2])


def test_random_damage_never_crashes_or_warns() -> None:
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        data = np.frombuffer(packed(scene(), format), dtype=np.uint8)
        for _ in range(60):
            damaged = data.copy()
            places = rng.integers(len(data), size=4)
            damaged[places] = rng.integers(256, size=4)
            try:
                assert read_image(damaged.tobytes()).mode == "RGB"
            except UnreadableImageError as error:
                assert error.reason  # noqa: PT017


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_picture_that_claims_to_be_huge_is_refused_without_a_warning(side: int) -> None:
    with pytest.raises(UnreadableImageError):
        read_image(png_header(side, side))


def test_postscript_is_not_run() -> None:
    with pytest.raises(UnreadableImageError, match="not a picture"):
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in (("pipe.jpg", "not a file"), ("", "not a file"), ("gone.jpg", "no such file")):
        with pytest.raises(UnreadableImageError, match=reason):
            read_image(tmp_path / name)


def test_the_error_carries_the_name_and_can_be_printed(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.jpg")  # Latin-1, as from an old archive
    path.write_bytes(b"")
    with pytest.raises(UnreadableImageError, match="empty file") as caught:
        load_square(path, 8)
    str(caught.value).encode("utf-8")
    with pytest.raises(UnreadableImageError, match=r"^a/b\.jpg: empty file$"):
        load_square(path, 8, name="a/b.jpg")


def test_many_threads_read_what_one_does() -> None:
    data = packed(scene(), "JPEG")
    sources = [data[:-2], data[:-300], data] * 30

    def read(source: bytes) -> bytes | None:
        try:
            return load_square(source, 16).tobytes()
        except UnreadableImageError:
            return None

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, sources)) == [read(source) for source in sources]


def test_odd_images(shared: Path) -> None:
    paths = sorted((shared / "data" / "odd_images").iterdir())
    assert len(paths) == 33
    squares = {}
    for path in paths:
        try:
            squares[path.name] = load_square(path, 64).astype(int)
        except UnreadableImageError as error:
            assert error.name == str(path)  # noqa: PT017
    assert {path.name for path in paths} - squares.keys() == REFUSED
    # One portrait in many guises. Two are grey, and two have been faded to white in places.
    portrait = squares["UPPER.JPG"]
    same = (
        "cmyk.jpg exif6_upright_after_transpose.jpg jpeg_named.png last_2_bytes_missing.jpg no_extension photo.bmp "
        "photo.tiff photo.webp png_named.jpg progressive.jpg"
    )
    for name in same.split():
        assert np.abs(squares[name] - portrait).mean() < 4, name
    grey = np.asarray(Image.fromarray(portrait.astype(np.uint8)).convert("L")).astype(int)[..., None]
    for name in ("gray.jpg", "gray16.png"):
        assert np.abs(squares[name] - grey).mean() < 4, name
    assert (squares["last_2_bytes_missing.jpg"] == portrait).all()


# --- writing


def test_a_png_keeps_pixels_and_metadata(tmp_path: Path) -> None:
    image = np.asarray(scene())
    metadata = {"seed": "7", "label": "männlich 字", "settings": '{"cfg": 4.0}'}
    write_png(tmp_path / "a.png", image, metadata)
    assert read_png_metadata(tmp_path / "a.png") == metadata
    assert (np.asarray(Image.open(tmp_path / "a.png")) == image).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.asarray(scene()))
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(TypeError):
        write_png(tmp_path / "a.png", np.zeros((4, 4, 7), dtype=np.float64))
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_metadata_of_what_is_no_png_is_refused(tmp_path: Path) -> None:
    scene().save(tmp_path / "a.png", "JPEG")
    with pytest.raises(UnreadableImageError):
        read_png_metadata(tmp_path / "a.png")


def test_a_grid_shows_every_image_whole() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(5, 64, 80, 3), dtype=np.uint8)
    grid = make_grid([images[:3], images[3:]], padding=2)
    assert grid.shape == (2 * 66 + 2, 3 * 82 + 2, 3)
    for i, image in enumerate(images):
        top, left = 2 + i // 3 * 66, 2 + i % 3 * 82
        assert (grid[top : top + 64, left : left + 80] == image).all()
    assert (grid[68:, 2 + 2 * 82 :] == 255).all()  # no sixth image


def test_a_grid_enlarges_tiny_images_and_writes_names_to_their_left() -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(2, 28, 28, 3), dtype=np.uint8)
    plain = make_grid([[images[0]], [images[1]]])
    assert plain.shape[0] == 2 * (3 * 28 + 2) + 2
    named = make_grid([[images[0]], [images[1]]], row_names=["sneaker", "bag"])
    margin = named.shape[1] - plain.shape[1]
    assert (named[:, margin:] == plain).all()
    ink = named[:, :margin, 0].min(axis=1) < 100
    heights = [ink[:86].sum(), ink[88:].sum()]
    assert all(8 <= height <= 40 for height in heights), heights  # each name in its own row, large enough to read


@pytest.mark.parametrize(
    ("rows", "names"),
    [([], []), ([[]], []), ([[np.zeros((4, 4, 3))], [np.zeros((5, 4, 3))]], []), ([[np.zeros((4, 4, 3))]], ["a", "b"])],
)
def test_a_grid_that_makes_no_sense_is_refused(rows: list[list[np.ndarray]], names: list[str]) -> None:
    with pytest.raises(ValueError):
        make_grid(rows, names)


def test_a_gif_keeps_frames_and_time(tmp_path: Path) -> None:
    frames = [np.full((16, 16, 3), value, dtype=np.uint8) for value in (0, 90, 255)]
    write_gif(tmp_path / "a.gif", frames, milliseconds=120)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3
        assert gif.info["loop"] == 0
        for i, frame in enumerate(frames):
            gif.seek(i)
            assert gif.info["duration"] == 120
            assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - frame).max() <= 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "QOI", "JPEG2000"])
def test_every_format_is_recognised_by_its_first_bytes(format: str) -> None:
    assert looks_like_picture(packed(scene(), format)[:16])


@pytest.mark.parametrize("head", [b"", b"BM", b"BMI of 21 and 22", b"<!doctype html>", b"\xd0\xcf\x11\xe0", b"P9 x"])
def test_other_files_are_not_taken_for_pictures(head: bytes) -> None:
    assert not looks_like_picture(head)
