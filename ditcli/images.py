"""Pictures in and out: any image file into upright uint8 RGB; PNGs with metadata, labelled grids and GIFs.

Everything here may be called from many threads at once.
"""

from __future__ import annotations

import functools
import io
import os
import re
import stat
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from ditcli.errors import UnreadableImageError
from ditcli.files import replacing

# Only these: of the others Pillow knows, EPS would start Ghostscript, and TGA is recognised in random bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI")
# Enough for any picture that passes Pillow's own limit of 179 million pixels; more is a mistake or an attack.
MAX_FILE_BYTES = 1 << 30
MIN_CELL = 64

_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|BM.{4}\0{4}|P[1-6]\s|P[fF]\n|qoif"
    rb"|....ftypavi[fs]|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    re.DOTALL,
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def looks_like_picture(head: bytes) -> bool:
    """Whether a file that starts with these bytes (16 are enough) claims to be in a format that `read_image` reads."""
    return _MAGIC.match(head) is not None


def read_image(source: str | Path | bytes | BinaryIO, name: str | None = None) -> Image.Image:
    """The whole picture as upright RGB, whatever its suffix says; of an animation the first frame.

    16-bit and float pictures are scaled to 0..255, transparent ones laid over white. Raises `UnreadableImageError`,
    under `name` or the path, for whatever is not a whole picture: broken, truncated, not a picture, or too large.
    """
    name = name if name is not None else str(source) if isinstance(source, str | Path) else "image"
    _quieten_pillow()
    try:
        return _to_rgb(_turn_upright(_decode(_read_bytes(source))))
    except Exception as error:  # on damaged files Pillow's decoders raise nearly every type there is
        raise UnreadableImageError(_printable(name), _reason(error)) from error


def load_square(source: str | Path | bytes | BinaryIO, size: int, name: str | None = None) -> np.ndarray:
    """A picture's centre square, resized: uint8 (size, size, 3). Raises `UnreadableImageError`."""
    return fit_square(read_image(source, name), size)


def fit_square(image: Image.Image, size: int) -> np.ndarray:
    """The centre square of an RGB picture, resized in one antialiased step: uint8 (size, size, 3)."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2  # whole pixels: a crop alone must not blur
    box = (left, top, left + side, top + side)
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=None))


def write_png(path: str | Path, image: np.ndarray, metadata: Mapping[str, str] | None = None) -> None:
    """Write uint8 (H, W, 3) or (H, W) with `metadata` as text chunks. The file appears whole or not at all."""
    text = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        text.add_text(key, value)  # iTXt where Latin-1 cannot say it
    with replacing(Path(path), lasting=False) as partial:
        Image.fromarray(image).save(partial, "PNG", pnginfo=text)


def read_png_metadata(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG. Raises `UnreadableImageError` for anything else."""
    _quieten_pillow()
    try:
        with Image.open(path, formats=["PNG"]) as image:
            assert isinstance(image, PngImagePlugin.PngImageFile)
            image.load()  # text may follow the pixels
            return {key: str(value) for key, value in image.text.items()}
    except Exception as error:
        raise UnreadableImageError(_printable(str(path)), _reason(error)) from error


def make_grid(rows: Sequence[Sequence[np.ndarray]], row_names: Sequence[str] = (), padding: int = 2) -> np.ndarray:
    """Rows of equally large uint8 (H, W, 3) images as one picture on white, each row's name to its left.

    Images of less than 64 pixels are enlarged by a whole factor, without smoothing. Rows may differ in length.
    """
    if not rows or not any(len(row) for row in rows):
        raise ValueError("a grid needs at least one image.")
    if row_names and len(row_names) != len(rows):
        raise ValueError(f"a grid of {len(rows)} rows got {len(row_names)} row names.")
    shapes = {image.shape for row in rows for image in row}
    if len(shapes) > 1:
        raise ValueError(f"images of a grid must be of one shape, but are {', '.join(map(str, sorted(shapes)))}.")
    height, width, channels = shapes.pop()
    factor = max(1, -(-MIN_CELL // min(height, width)))
    height, width = height * factor, width * factor

    font = ImageFont.load_default(size=min(24, max(13, height // 8)))
    names = [name if len(name) <= 24 else name[:23] + "…" for name in row_names]
    margin = max((int(font.getlength(name)) + 12 for name in names), default=0)
    num_columns = max(len(row) for row in rows)
    shape = (len(rows) * (height + padding) + padding, margin + num_columns * (width + padding) + padding, channels)
    grid = np.full(shape, 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = padding + i * (height + padding), margin + padding + j * (width + padding)
            grid[top : top + height, left : left + width] = image.repeat(factor, axis=0).repeat(factor, axis=1)
    if not names:
        return grid
    picture = Image.fromarray(grid)
    draw = ImageDraw.Draw(picture)
    for i, name in enumerate(names):
        middle = padding + i * (height + padding) + height // 2
        draw.text((margin - 6, middle), name, fill=(0, 0, 0), font=font, anchor="rm")
    return np.array(picture)


def cut_grid(grid: np.ndarray, size: int, num_columns: int, padding: int = 2) -> list[list[np.ndarray]]:
    """The (size, size, 3) images that `make_grid` put together, without the rows' names."""
    factor = max(1, -(-MIN_CELL // size))
    cell = size * factor + padding
    margin = max(0, grid.shape[1] - padding - num_columns * cell)
    rows, columns = (grid.shape[0] - padding) // cell, (grid.shape[1] - margin - padding) // cell
    inner = grid[padding:, margin + padding :]
    corners = [[(i * cell, j * cell) for j in range(columns)] for i in range(rows)]
    return [
        [inner[top : top + cell - padding, left : left + cell - padding][::factor, ::factor] for top, left in row]
        for row in corners
    ]


def write_gif(path: str | Path, frames: Sequence[np.ndarray], milliseconds: int | Sequence[int]) -> None:
    """Write uint8 (H, W, 3) frames as an endless GIF, each shown for `milliseconds`. Appears whole or not at all."""
    if not frames:
        raise ValueError("a GIF needs at least one frame.")
    first, *others = [Image.fromarray(frame) for frame in frames]
    with replacing(Path(path), lasting=False) as partial:
        first.save(partial, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)


def _read_bytes(source: str | Path | bytes | BinaryIO) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | Path):
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise ValueError("not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES >> 30} GB")
        return Path(source).read_bytes()
    return source.read()


def _decode(data: bytes) -> Image.Image:
    """The picture with its pixels loaded. Raises whatever Pillow does when it is not whole."""
    if not data:
        raise ValueError("empty file")
    image = Image.open(io.BytesIO(data), formats=_known_formats())
    if image.format in ("JPEG", "MPO") and not _has_end_marker(data):
        return _decode_jpeg_without_end(data)
    image.load()
    return image


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # older Pillows lack AVIF


_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_JPEG_END, _JPEG_SCAN, _JPEG_RESTART_INTERVAL = 0xD9, 0xDA, 0xDD
_JPEG_RESTARTS = range(0xD0, 0xD8)
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
# Huffman and quantisation tables, line count, application data and comments may stand between two scans.
_JPEG_BETWEEN_SCANS = {0xC4, 0xDB, 0xDC, _JPEG_RESTART_INTERVAL, *range(0xE0, 0xF0), 0xFE}


def _has_end_marker(jpeg: bytes) -> bool:
    """Whether a JPEG file has its end marker. Raises ValueError where pixels are missing in any case.

    That is before a marker that cannot stand among pixels: libjpeg takes it for their end and paints the rest grey,
    with no word that Pillow passes on. And when the file ends before the last of its scans has begun.
    """
    position, in_scans, has_restarts = 2, False, False
    missing: set[tuple[int, int]] = set()  # (component, coefficient) whose last bit no scan has brought yet
    while match := _JPEG_MARKER.search(jpeg, position):
        marker, position = match[1][0], match.end()
        if marker == _JPEG_END:
            return True
        if in_scans and marker in _JPEG_RESTARTS and has_restarts:
            continue
        if in_scans and marker != _JPEG_SCAN and marker not in _JPEG_BETWEEN_SCANS:
            raise ValueError(f"damaged at byte {match.start()}")
        length = int.from_bytes(jpeg[position : position + 2])
        body = jpeg[position + 2 : position + length]
        position += length
        if marker == _JPEG_RESTART_INTERVAL:
            has_restarts = body != b"\0\0"
        elif marker in _JPEG_FRAMES:
            missing = {(component, k) for component in body[6::3] for k in range(64)}
        elif marker == _JPEG_SCAN and len(body) >= 6:
            in_scans = True
            first, last, bits = body[-3:]  # T.81 B.2.3: spectral selection, successive approximation
            if bits & 15 == 0:
                missing -= {(component, k) for component in body[1:-3:2] for k in range(first, last + 1)}
    if missing:
        raise ValueError("truncated")
    return False


def _decode_jpeg_without_end(jpeg: bytes) -> Image.Image:
    """A JPEG file whose end marker is missing: whole when nothing that could follow would change a pixel."""
    pixels = jpeg.rstrip(b"\0")
    if len(jpeg) - len(pixels) < 512:  # so many zeros were left by a download that stopped; they decode to flat blocks
        pixels = jpeg
    pixels = pixels.removesuffix(b"\xff")
    # Arbitrary pixels, and more after the restart marker that the decoder may be waiting for.
    restarts = re.findall(rb"\xff([\xd0-\xd7])", pixels[pixels.rfind(bytes([0xFF, _JPEG_SCAN])) :])
    next_restart = _JPEG_RESTARTS[(restarts[-1][0] + 1) % 8 if restarts else 0]
    arbitrary = bytes(range(0xAA, 0xFF)) * 12
    whole, other = (
        Image.open(io.BytesIO(pixels + ending + bytes([0xFF, _JPEG_END])), formats=("JPEG",))
        for ending in (b"", arbitrary + bytes([0xFF, next_restart]) + arbitrary)
    )
    if whole.tobytes() != other.tobytes():
        raise ValueError("truncated")
    return whole


def _turn_upright(image: Image.Image) -> Image.Image:
    """As the EXIF orientation says; Pillow has already turned a TIFF."""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # broken EXIF data makes no broken picture
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        turned = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert turned is not None  # it is None only when told to work in place
        return turned
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of more than 8 bits, scaled so that the white of their range is 255."""
    whites: list[float]
    if image.mode == "F":
        whites = [1, 255, 65535]  # nothing in the file says which: the narrowest that holds the values
    elif image.mode == "I" and image.format == "TIFF":
        whites = [255, 65535]
    else:
        whites = [65535]
    values = np.array(image, dtype=np.float32)
    values[~np.isfinite(values)] = 0
    if "transparency" in image.info:
        values[values == image.info["transparency"]] = 65535
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > whites[-1]:
        values, high, whites = values - low, high - low, [high - low or 1]
    white = next(white for white in whites if high <= white)
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def _quieten_pillow() -> None:
    """Keep Pillow's warnings (a large picture, odd EXIF data) from the terminal: what matters here is raised.

    A filter for good, because `warnings.catch_warnings` is not safe with threads.
    """
    quiet = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    if quiet not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a format that ditcli reads"
    if isinstance(error, Image.DecompressionBombError):
        return "too large: more than 178 million pixels"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    message = str(error)
    return "truncated" if "truncated" in message.lower() else message or type(error).__name__


def _printable(name: str) -> str:
    """A file name whose bytes are not UTF-8 can be printed too."""
    return os.fsencode(name).decode("utf-8", "replace")
