"""Every layout of a data folder, built here from drawn pictures, and the real ones beside the checkout."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditcli.data.folders import open_dataset
from ditcli.errors import DataError, UnreadableImageError

ATTRIBUTES = ["5_o_Clock_Shadow", "Male", "No_Beard", "Smiling"]


def draw(path: Path, grey: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (grey, grey, grey)).save(path)


def classes_of(folder: Path, **options: str) -> dict[str, str | None]:
    """Picture -> class name, as the data set says."""
    dataset = open_dataset(str(folder), **options)
    labels = [None] * len(dataset) if dataset.labels is None else [dataset.class_names[i] for i in dataset.labels]
    assert len(dataset.names) == len(set(dataset.names)) == len(labels)
    return dict(zip(dataset.names, labels, strict=True))


def refusal(folder: Path | str, **options: str) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(str(folder), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- CelebA


def celeba(folder: Path, rows: dict[str, tuple[int, ...]], suffix: str = "txt", pictures: str = "img_align_celeba"):
    for i, name in enumerate(rows):
        draw(folder / pictures / name, grey=i)
    if suffix == "csv":
        lines = [",".join(["image_id", *ATTRIBUTES])]
        lines += [",".join([name, *map(str, values)]) for name, values in rows.items()]
    else:  # aligned columns and a blank at the end of the names, as in the original
        lines = [str(len(rows)), " ".join(ATTRIBUTES) + " "]
        lines += [name + "".join(f" {value:2}" for value in values) for name, values in rows.items()]
    (folder / f"list_attr_celeba.{suffix}").write_text("\n".join(lines) + "\n")


ROWS = {"000001.jpg": (-1, 1, 1, -1), "000002.jpg": (-1, -1, 1, 1), "000007.jpg": (1, 1, -1, 1)}


@pytest.mark.parametrize("pictures", ["img_align_celeba", "img_align_celeba/img_align_celeba"])
@pytest.mark.parametrize("suffix", ["txt", "csv"])
def test_celeba(tmp_path: Path, suffix: str, pictures: str) -> None:
    celeba(tmp_path, ROWS, suffix, pictures)
    expected = dict(zip(ROWS, ["male", "female", "male"], strict=True))
    assert classes_of(tmp_path) == {f"{pictures}/{name}": label for name, label in expected.items()}
    dataset = open_dataset(str(tmp_path))
    assert dataset.layout == f"CelebA layout (list_attr_celeba.{suffix}, attribute Male)"
    assert dataset.class_names == ("female", "male")
    assert dataset.summary() == "3 images, 2 classes: female 1, male 2"
    assert (dataset.load(1, 6) == 1).all()


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("Smiling", ["not-smiling", "smiling", "smiling"]),
        ("smiling", ["not-smiling", "smiling", "smiling"]),
        ("No_Beard", ["no-beard", "no-beard", "beard"]),
        ("5-o-clock-shadow", ["not-5-o-clock-shadow", "not-5-o-clock-shadow", "5-o-clock-shadow"]),
    ],
)
def test_any_attribute_makes_two_classes(tmp_path: Path, attribute: str, expected: list[str]) -> None:
    celeba(tmp_path, ROWS)
    assert list(classes_of(tmp_path, label_attr=attribute).values()) == expected


def test_an_unknown_attribute_suggests_the_nearest(tmp_path: Path) -> None:
    celeba(tmp_path, ROWS)
    assert "Did you mean 'Smiling'?" in refusal(tmp_path, label_attr="Smilling")
    assert "Known: 5_o_Clock_Shadow, Male" in refusal(tmp_path, label_attr="xyz")


def test_celeba_says_which_pictures_are_missing_or_unlisted(tmp_path: Path) -> None:
    celeba(tmp_path, ROWS)
    (tmp_path / "img_align_celeba" / "000002.jpg").unlink()
    draw(tmp_path / "img_align_celeba" / "000099.jpg")
    draw(tmp_path / "img_align_celeba" / "000098.jpg")
    dataset = open_dataset(str(tmp_path))
    assert [name[-10:] for name in dataset.names] == ["000001.jpg", "000007.jpg"]
    summary = dataset.summary()
    assert "; 1 listed picture is missing" in summary
    assert "; 2 pictures are not listed and left out" in summary


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "truncated"),
        ("1\n", "truncated"),
        ("1\nMale\n000001.jpg\n", "line 3"),
        ("1\nMale Young\n000001.jpg 1 1\n000001.jpg 1 1\n", "line 4: '000001.jpg' is listed a second time"),
        ("1\nMale\n000001.jpg yes\n", "line 3"),
        ("1\nMale\n../000001.jpg 1\n", "leads out of the folder"),
        ("1\nMale\n000009.jpg 1\n", "none of them is in"),
    ],
)
def test_a_broken_attribute_list_is_named_with_its_line(tmp_path: Path, text: str, reason: str) -> None:
    draw(tmp_path / "img_align_celeba" / "000001.jpg")
    (tmp_path / "list_attr_celeba.txt").write_text(text)
    message = refusal(tmp_path)
    assert reason in message
    assert "list_attr_celeba.txt" in message


def test_an_attribute_list_alone_asks_for_the_pictures(tmp_path: Path) -> None:
    (tmp_path / "list_attr_celeba.txt").write_text("0\nMale\n")
    assert "needs the folder img_align_celeba" in refusal(tmp_path)


# --- class subfolders and flat folders


def test_class_subfolders_are_sorted_and_searched_to_any_depth(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/2.jpg", "cat/kittens/tiny/3.webp", "ant/4.bmp"):
        draw(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert classes_of(tmp_path) == {
        "ant/4.bmp": "ant",
        "cat/2.jpg": "cat",
        "cat/kittens/tiny/3.webp": "cat",
        "dog/1.png": "dog",
    }
    dataset = open_dataset(str(tmp_path))
    assert dataset.class_names == ("ant", "cat", "dog")
    assert dataset.labels is not None
    assert dataset.labels.dtype == np.int64
    assert dataset.layout == "class subfolders"


def test_one_loose_picture_makes_the_folder_flat_and_the_summary_says_so(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/2.png", "loose.png"):
        draw(tmp_path / name)
    assert classes_of(tmp_path) == {"cat/2.png": None, "dog/1.png": None, "loose.png": None}
    dataset = open_dataset(str(tmp_path))
    assert dataset.labels is None
    assert dataset.class_names == ()
    assert dataset.layout == "flat folder"
    assert "subfolders (cat, dog) are no classes" in dataset.summary()


@pytest.mark.parametrize("around", ["faces", "faces/faces"])
def test_a_folder_in_a_folder_stands_for_it(tmp_path: Path, around: str) -> None:
    for name in ("a/1.png", "b/2.png"):
        draw(tmp_path / around / name)
    assert classes_of(tmp_path) == {f"{around}/a/1.png": "a", f"{around}/b/2.png": "b"}
    draw(tmp_path / around / "3.png")
    assert set(classes_of(tmp_path).values()) == {None}


def test_of_training_and_test_folders_the_training_one_is_taken(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "test/a/3.png", "val/b/4.png"):
        draw(tmp_path / name)
    assert classes_of(tmp_path) == {"train/a/1.png": "a", "train/b/2.png": "b"}
    assert "train is taken" in open_dataset(str(tmp_path)).summary()


def test_pictures_are_found_by_suffix_or_by_content(tmp_path: Path) -> None:
    draw(tmp_path / "UPPER.JPG")
    draw(tmp_path / "a.png")
    for name in ("no_extension", "1.jpg_large", "notes.txt"):
        os.link(tmp_path / "a.png", tmp_path / name)
    (tmp_path / "README").write_text("no picture")
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "broken.jpg").write_text("no picture either, but it claims to be")
    dataset = open_dataset(str(tmp_path))
    assert list(dataset.names) == ["1.jpg_large", "UPPER.JPG", "a.png", "broken.jpg", "no_extension"]
    assert dataset.load(4, 4).shape == (4, 4, 3)
    with pytest.raises(UnreadableImageError, match=r"^broken\.jpg: not a picture"):
        dataset.load(3, 4)


def test_hidden_files_and_links_out_of_the_folder_are_left_out(tmp_path: Path) -> None:
    folder, outside = tmp_path / "data", tmp_path / "outside"
    for path in (folder / "a.png", folder / ".hidden.png", folder / "._a.png", folder / ".cache" / "b.png"):
        draw(path)
    draw(folder / "__MACOSX" / "c.png")
    draw(outside / "secret.png")
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "folder").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    (folder / "again.png").symlink_to("a.png")
    (folder / "dangling.png").symlink_to("gone.png")
    os.mkfifo(folder / "pipe.png")
    dataset = open_dataset(str(folder))
    assert list(dataset.names) == ["a.png", "again.png"]
    assert "2 links out of the folder are left out" in dataset.summary()


def test_names_that_are_no_unicode_are_read(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    dataset = open_dataset(str(tmp_path))
    assert dataset.load(0, 4).shape == (4, 4, 3)
    assert re.fullmatch("[0-9a-f]{64}", dataset.fingerprint())


@pytest.mark.parametrize("content", [[], ["notes.txt"], [".hidden.png"]])
def test_a_folder_without_pictures_says_what_is_understood(tmp_path: Path, content: list[str]) -> None:
    for name in content:
        (tmp_path / name).write_text("x")
    message = refusal(tmp_path)
    for word in ("CelebA", "class subfolders", "metadata.jsonl", "idx", "flat folder"):
        assert word in message


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "gone")
    assert "no data was named" in refusal("")
    for name, hint in (("a.zip", "unpack it first"), ("a.png", "give the folder")):
        (tmp_path / name).write_bytes(b"")
        assert hint in refusal(tmp_path / name)


def test_an_attribute_without_celeba_is_refused(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    assert "label-attr 'Smiling' is for the CelebA layout" in refusal(tmp_path, label_attr="Smiling")


# --- metadata


def test_metadata_jsonl(tmp_path: Path) -> None:
    for name in ("a.png", "sub/ü, 字.png", "unlisted.png"):
        draw(tmp_path / name)
    rows = [{"file_name": "a.png", "label": "tabby, grey", "x": 1}, {"file_name": "./sub/ü, 字.png", "label": "ant"}]
    text = "\n".join(json.dumps(row, ensure_ascii=i == 0) for i, row in enumerate(rows))
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + text + "\n\n", encoding="utf-8")
    assert classes_of(tmp_path) == {"a.png": "tabby, grey", "sub/ü, 字.png": "ant"}
    dataset = open_dataset(str(tmp_path))
    assert dataset.class_names == ("ant", "tabby, grey")
    assert dataset.layout == "pictures listed in metadata.jsonl"
    assert "1 picture is not listed and left out" in dataset.summary()


def test_metadata_csv(tmp_path: Path) -> None:
    for name in ("a.png", "b, c.png", "d.png"):
        draw(tmp_path / name)
    text = '\ufefflabel,file_name,caption\r\n10,a.png,"two\r\nlines"\r\n9,"b, c.png",\r\n10,d.png,"say ""hi"""\r\n'
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    assert classes_of(tmp_path) == {"a.png": "10", "b, c.png": "9", "d.png": "10"}
    assert open_dataset(str(tmp_path)).class_names == ("9", "10")  # by value


@pytest.mark.parametrize(
    ("name", "text"), [("metadata.csv", "file_name\na.png\n"), ("metadata.jsonl", '{"file_name": "a.png"}')]
)
def test_metadata_without_labels(tmp_path: Path, name: str, text: str) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    assert classes_of(tmp_path) == {"a.png": None}
    assert "no labels" in open_dataset(str(tmp_path)).layout


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("metadata.csv", "", "needs file_name"),
        ("metadata.csv", "image,label\na.png,1\n", "has the columns image, label, but needs file_name"),
        ("metadata.csv", "file_name,label\na.png\n", "line 2"),
        ("metadata.csv", 'file_name,label\n"a.png,1\n', "unexpected end"),
        ("metadata.csv", "file_name,label\na.png,1\na.png,2\n", "listed a second time"),
        ("metadata.csv", "file_name,label\na.png,1\nb.png,\n", "line 3: no label"),
        ("metadata.csv", "file_name,label\n/etc/a.png,1\n", "leads out of the folder"),
        ("metadata.csv", "file_name,label\nsub/../../a.png,1\n", "leads out of the folder"),
        ("metadata.csv", "file_name,label\nlink.png,1\n", "none of them"),
        ("metadata.csv", "file_name,label\ngone.png,1\n", "none of them"),
        ("metadata.csv", "file_name,label\n", "lists no pictures"),
        ("metadata.csv", b"file_name\ncaf\xe9.png\n", "UTF-8"),
        ("metadata.jsonl", "{", "line 1: not JSON"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 1}\n[1]', "line 2"),
        ("metadata.jsonl", '{"label": "x"}', "line 1: no file_name"),
        ("metadata.jsonl", '{"file_name": 3}', "line 1: no file_name"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": ["x"]}', "label is ['x']"),
    ],
)
def test_broken_metadata_is_named_with_its_line(tmp_path: Path, name: str, text: str | bytes, reason: str) -> None:
    folder = tmp_path / "data"
    draw(folder / "a.png")
    draw(folder / "b.png")
    draw(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(folder)
    assert reason in message
    assert name in message


# --- idx


def idx(values: np.ndarray) -> bytes:
    shape = b"".join(length.to_bytes(4, "big") for length in values.shape)
    return bytes([0, 0, 8, values.ndim]) + shape + values.tobytes()


def write_idx(folder: Path, split: str, images: np.ndarray, labels: np.ndarray, packed: bool) -> None:
    folder.mkdir(exist_ok=True)
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        path = folder / f"{split}-{kind}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(idx(values)) if packed else idx(values))


DIGITS = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)
LABELS = np.array([2, 0, 1, 2], dtype=np.uint8)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(tmp_path: Path, packed: bool) -> None:
    write_idx(tmp_path, "train", DIGITS, LABELS, packed)
    write_idx(tmp_path, "t10k", DIGITS[:1] + 100, LABELS[:1], packed)
    dataset = open_dataset(str(tmp_path))
    assert len(dataset) == 4
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [2, 0, 1, 2]
    assert dataset.layout.startswith("MNIST idx files (train-images-idx3-ubyte")
    assert (dataset.load(3, 5) == DIGITS[3, :, :5, None]).all()  # the middle five of six columns, rounded to the left
    (tmp_path / "class_names.txt").write_text("ant\nbee\ncat\n")
    assert open_dataset(str(tmp_path)).class_names == ("ant", "bee", "cat")


def test_idx_test_set_alone_and_without_labels(tmp_path: Path) -> None:
    write_idx(tmp_path, "t10k", DIGITS, LABELS, packed=False)
    assert len(open_dataset(str(tmp_path))) == 4
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    dataset = open_dataset(str(tmp_path))
    assert dataset.labels is None
    assert "no t10k-labels-idx1-ubyte, so no classes" in dataset.summary()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-1], "truncated"),
        (lambda data: data[:9], "ends within its header"),
        (lambda data: b"", "starts with nothing"),
        (lambda data: data + b"x", "holds more"),
        (lambda data: b"\0\0\x0d\x03" + data[4:], "starts with 00000d03"),
        (lambda data: data[:4] + b"\xff" * 12 + data[16:], "truncated"),
        (lambda data: data[:4] + bytes(12), "is empty"),
        (lambda data: gzip.compress(data)[:-20], "damaged or truncated"),
        (lambda data: gzip.compress(data)[:-8] + bytes(8), "damaged or truncated"),
    ],
)
def test_a_damaged_idx_file_is_refused(tmp_path: Path, damage, reason: str) -> None:
    write_idx(tmp_path, "train", DIGITS, LABELS, packed=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(tmp_path)
    assert reason in message
    assert path.name in message


def test_labels_and_class_names_must_match_the_pictures(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", DIGITS, LABELS[:3], packed=False)
    assert "holds 3 labels, but train-images-idx3-ubyte holds 4 pictures" in refusal(tmp_path)
    write_idx(tmp_path, "train", DIGITS, LABELS, packed=False)
    (tmp_path / "class_names.txt").write_text("ant\nbee\n")
    assert "names 2 classes, but the labels go up to 2" in refusal(tmp_path)
    (tmp_path / "class_names.txt").write_text("ant\nbee\nant\n")
    assert "names a class twice" in refusal(tmp_path)


# --- the embedded pictures


def test_embedded_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = open_dataset("fashion-mnist")
    assert dataset.class_names == (
        *("t-shirt", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle-boot"),
    )
    assert dataset.labels is not None
    assert len(dataset) >= 5000
    assert len(set(Counter(dataset.labels.tolist()).values())) == 1
    # What tells the classes apart at a glance: trousers are narrow, bags and coats are bright, sandals are dark.
    images = np.stack([dataset.load(i, 28)[..., 0] for i in range(1000)]).astype(float)
    assert (images.min(), images.max()) == (0, 255)
    brightness = [images[dataset.labels[:1000] == i].mean() for i in range(10)]
    assert np.argmin(brightness) == dataset.class_names.index("sandal")
    lit_columns = [(images[dataset.labels[:1000] == i].mean(axis=(0, 1)) > 25).sum() for i in range(10)]
    assert np.argmin(lit_columns) == dataset.class_names.index("trouser")

    draw(tmp_path / "fashion-mnist" / "a.png")  # a folder of that name comes first
    assert len(open_dataset("fashion-mnist")) == 1


def test_embedded_files_fit_into_the_wheel() -> None:
    folder = Path(open_dataset.__code__.co_filename).parent / "fashion_mnist"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3_000_000
    licence = (folder / "LICENSE").read_text()
    assert "Zalando" in licence
    assert "Permission is hereby granted" in licence


# --- fingerprint


def test_the_fingerprint_follows_every_change(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return open_dataset(str(tmp_path)).fingerprint()

    draw(tmp_path / "cat" / "1.png", grey=10)
    draw(tmp_path / "dog" / "2.png", grey=20)
    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    (tmp_path / "notes.txt").write_text("no part of the pictures")
    assert fingerprint() == seen[0]

    status = (tmp_path / "cat" / "1.png").stat()
    draw(tmp_path / "cat" / "1.png", grey=11)  # the same size, another content
    os.utime(tmp_path / "cat" / "1.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    seen.append(fingerprint())
    draw(tmp_path / "dog" / "3.png")
    seen.append(fingerprint())
    (tmp_path / "dog" / "3.png").rename(tmp_path / "dog" / "4.png")
    seen.append(fingerprint())
    (tmp_path / "dog").rename(tmp_path / "elk")
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


def test_the_fingerprint_of_idx_files_follows_their_content_not_their_time(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", DIGITS, LABELS, packed=False)
    first = open_dataset(str(tmp_path)).fingerprint()
    os.utime(tmp_path / "train-images-idx3-ubyte", (0, 0))
    assert open_dataset(str(tmp_path)).fingerprint() == first
    write_idx(tmp_path, "train", DIGITS, LABELS[::-1], packed=False)
    second = open_dataset(str(tmp_path)).fingerprint()
    write_idx(tmp_path, "train", DIGITS + 1, LABELS[::-1], packed=False)
    third = open_dataset(str(tmp_path)).fingerprint()
    assert len({first, second, third}) == 3


# --- real data


@pytest.mark.parametrize(
    ("name", "summary"),
    [
        ("celeba", "4,559 images, 2 classes: female 2,517, male 2,042"),
        ("faces128", "8,000 images, 2 classes: female 4,000, male 4,000"),
    ],
)
def test_real_folders(shared: Path, name: str, summary: str) -> None:
    dataset = open_dataset(str(shared / "data" / name))
    assert dataset.summary() == summary
    assert dataset.load(len(dataset) - 1, 64).std() > 10


def test_real_celeba_labels_equal_the_list(shared: Path) -> None:
    lines = (shared / "data" / "celeba" / "list_attr_celeba.txt").read_text().split("\n")
    column = lines[1].split().index("Smiling") + 1
    smiling = {f"img_align_celeba/{line.split()[0]}" for line in lines[2:] if line and line.split()[column] == "1"}
    classes = classes_of(shared / "data" / "celeba", label_attr="Smiling")
    assert {name for name, label in classes.items() if label == "smiling"} == smiling


def test_real_mnist(shared: Path) -> None:
    dataset = open_dataset(str(shared / "data" / "mnist"))
    assert len(dataset) == 60_000
    assert dataset.class_names == tuple("0123456789")
    assert dataset.labels is not None
    assert dataset.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # as everyone's MNIST starts
    stored = gzip.decompress((shared / "data" / "mnist" / "train-images-idx3-ubyte.gz").read_bytes())
    first = np.frombuffer(stored[16 : 16 + 784], dtype=np.uint8).reshape(28, 28)
    assert (dataset.load(0, 28) == first[..., None]).all()


def test_odd_images_all_load_or_are_refused(shared: Path) -> None:
    dataset = open_dataset(str(shared / "data" / "odd_images"))
    assert dataset.labels is None
    assert "no_extension" in dataset.names
    assert "Thumbs.db" not in dataset.names
    unreadable = []
    for i in range(len(dataset)):
        try:
            assert dataset.load(i, 32).shape == (32, 32, 3)
        except UnreadableImageError as error:
            unreadable.append(error.name)
    assert len(dataset) == 32
    assert len(unreadable) == 8


def test_importing_the_data_room_imports_no_torch() -> None:

    program = "import sys, ditcli.data.folders, ditcli.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
