"""The latent cache: whole or absent, and the same pictures whatever the order they are read in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ditcli.codecs.folder import open_codec
from ditcli.codecs.pixels import PixelCodec
from ditcli.data import latents
from ditcli.data.folders import open_dataset
from ditcli.data.latents import cache_folder, load_latents
from ditcli.errors import DataError, UnreadableImageError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITCLI_CACHE", str(tmp_path / "cache"))


def write_pictures(folder: Path, num: int = 70) -> Path:
    """More than two batches of plain pictures, number i of grey level i, in two classes."""
    for i in range(num):
        path = folder / ("dark" if i < num // 2 else "light") / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), (i, i, i)).save(path)
    return folder


def load(folder: Path, **options) -> latents.Latents:
    return load_latents(open_dataset(str(folder)), PixelCodec(), image_size=8, flip=True, num_workers=2, **options)


def test_pictures_come_in_order_and_are_encoded_once(tmp_path):
    folder = write_pictures(tmp_path / "data")
    first = load(folder)
    assert first.moments.shape == (70, 1, 3, 8, 8)  # pixels: the flip needs no second encoding
    assert first.moments.dtype == np.uint8
    assert [int(m[0, 0, 0, 0]) for m in first.moments] == list(range(70))
    assert first.labels.tolist() == [0] * 35 + [1] * 35
    (made,) = (cache_folder() / "latents").iterdir()
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    again = load(folder)
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before
    np.testing.assert_array_equal(again.moments, first.moments)
    Image.new("RGB", (20, 30), (9, 9, 9)).save(folder / "dark" / "000.png")  # a changed picture is another data set
    assert load(folder).moments[0, 0, 0, 0, 0] == 9


def test_unreadable_pictures_are_left_out_and_named(tmp_path, capsys):
    folder = write_pictures(tmp_path / "data")
    (folder / "dark" / "003.png").write_bytes(b"not a picture")
    (folder / "light" / "069.png").write_bytes(b"")
    found = load(folder)
    assert [int(m[0, 0, 0, 0]) for m in found.moments] == [i for i in range(70) if i not in (3, 69)]
    assert found.labels.tolist() == [0] * 34 + [1] * 34
    told = capsys.readouterr().err
    assert "2 unreadable images" in told
    assert "003.png" in told
    assert "069.png" in told
    with pytest.raises(UnreadableImageError, match=r"003\.png"):
        load(folder, strict=True)


def test_strict_stops_at_the_first_and_leaves_nothing(tmp_path):
    folder = write_pictures(tmp_path / "data", num=10)
    (folder / "dark" / "003.png").write_bytes(b"not a picture")
    with pytest.raises(UnreadableImageError):
        load(folder, strict=True)
    assert list((cache_folder() / "latents").iterdir()) == []


def test_no_readable_picture_is_an_error(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"no")
    with pytest.raises(DataError, match="none of the 1"):
        load(tmp_path / "data")


def test_an_interrupted_cache_is_never_taken_for_a_whole_one(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "data")
    codec = PixelCodec()
    calls = []

    def stop_at_the_second_batch(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return images

    monkeypatch.setattr(codec, "encode", stop_at_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        load_latents(open_dataset(str(folder)), codec, image_size=8, flip=False)
    assert list((cache_folder() / "latents").iterdir()) == []
    # A killed process cannot clean up: its folder carries another name, and a whole one is made beside it.
    monkeypatch.undo()
    monkeypatch.setenv("DITCLI_CACHE", str(tmp_path / "cache"))
    whole = load(folder)
    (made,) = (cache_folder() / "latents").iterdir()
    (made / latents.MANIFEST).unlink()
    np.testing.assert_array_equal(load(folder).moments, whole.moments)


def test_what_a_killed_encoding_left_is_cleared_and_a_damaged_cache_is_a_sentence(tmp_path):
    folder = write_pictures(tmp_path / "data", num=4)
    load(folder)
    (made,) = (cache_folder() / "latents").iterdir()
    left = made.with_name(f"{made.name}.partial-4194300")  # more than the highest process number
    left.mkdir()
    (made / latents.MANIFEST).unlink()
    load(folder)
    assert not left.exists()
    (made / "moments.npy").write_bytes((made / "moments.npy").read_bytes()[:-10])
    with pytest.raises(DataError, match="damaged"):
        load(folder)


def test_a_full_disk_is_told_before_encoding(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "data", num=4)
    usage = latents.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(latents.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(DataError, match="DITCLI_CACHE"):
        load(folder)
    assert list((cache_folder() / "latents").iterdir()) == []


def test_both_flips_of_real_pictures_are_stored(shared):
    codec = open_codec(shared / "weights" / "taesd")
    whole = open_dataset(str(shared / "data" / "odd_images"))
    found = load_latents(whole, codec, image_size=32, flip=True)
    assert found.moments.shape[1:] == (2, 4, 4, 4)
    assert len(found.moments) + len(found.unreadable) == len(whole)
    readable = [i for i, name in enumerate(whole.names) if not any(u.startswith(f"{name}:") for u in found.unreadable)]
    for row, index in enumerate(readable[:3]):
        image = torch.from_numpy(whole.load(index, 32)).permute(2, 0, 1)[None]
        for flip, picture in enumerate((image, image.flip(-1))):
            expected = codec.encode(picture)[0].numpy()
            np.testing.assert_allclose(found.moments[row, flip], expected, atol=2e-3)  # stored in 16 bits
