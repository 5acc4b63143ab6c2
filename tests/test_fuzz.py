"""Whatever a file, a config or a command line holds: it is read, or refused in a sentence; nothing else happens.

Seconds in the default suite, minutes with `-m slow`, hours with scripts/fuzz.sh. `DITCLI_FUZZ_EXAMPLES` is the number
of examples of each law, drawn anew each time when it is set.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from exports import TINY, make_latent_run, make_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

import ditcli.config
from ditcli.cli.main import COMMANDS, cli, run
from ditcli.codecs.folder import read_autoencoder
from ditcli.config import Config, FidConfig, TrainConfig
from ditcli.data.folders import open_dataset
from ditcli.data.idx import read_idx
from ditcli.data.labels import read_attributes, read_metadata
from ditcli.data.latents import open_latents
from ditcli.errors import DataError, DitcliError, SettingError, UnreadableImageError
from ditcli.evaluation.sides import open_side
from ditcli.images import read_image, read_png_metadata
from ditcli.models.weights import load_dit
from ditcli.runs import RunDir, is_checkpoint, read_model_config, state_file
from ditcli.training.setup import check_same_settings

EXAMPLES = int(os.environ.get("DITCLI_FUZZ_EXAMPLES", "15"))
CHOSEN = "DITCLI_FUZZ_EXAMPLES" in os.environ
MINUTES = 30  # times as many

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
EXTREME = st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30, 0.5, float("inf"), float("nan"), "", "0", None, [], {}])
VALUES = EXTREME | JSON


@st.composite
def changed_json(draw: Any, values: Any) -> Any:
    """The same JSON with a few of its values replaced, at any depth."""
    values = json.loads(json.dumps(values))
    for _ in range(draw(st.integers(1, 3))):
        place = values
        while isinstance(place, dict | list) and place:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], dict | list) or not place[key] or draw(st.booleans()):
                if isinstance(place, dict) and draw(st.integers(0, 4)) == 0:
                    del place[key]
                else:
                    place[key] = draw(VALUES)
                break
            place = place[key]
    return values


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """The same bytes cut, with some of them replaced, or with others in between."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)) | st.integers(0, min(len(data), 64)))
        piece = draw(st.binary(max_size=8) | st.sampled_from([b"\xff" * 4, b"\0" * 8, b"\x7f\xff\xff\xff"]))
        match draw(st.sampled_from(["replace", "insert", "cut"])):
            case "replace":
                data[at : at + len(piece)] = piece
            case "insert":
                data[at:at] = piece
            case "cut":
                del data[at:]
    return bytes(data)


# Configs and command lines

CONFIGS = [kind for kind in vars(ditcli.config).values() if dataclasses.is_dataclass(kind) and issubclass(kind, Config)]


@st.composite
def settings_of_a_config(draw: Any) -> tuple[type[Config], dict[str, Any]]:
    kind = draw(st.sampled_from(CONFIGS))
    fields = {field.name: field for field in dataclasses.fields(kind)}
    chosen = draw(st.lists(st.sampled_from(sorted(fields)), max_size=6, unique=True))
    return kind, {name: draw(VALUES | _likely(fields[name])) for name in chosen}


def _likely(field: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
    if choices := field.metadata.get("choices"):
        return st.sampled_from(choices)
    kind = str(field.type)
    if "int" in kind:
        return st.integers(-2, 300) | st.lists(st.integers(-2, 300), max_size=4)
    if "float" in kind:
        return st.floats(-1, 10)
    return st.booleans() if "bool" in kind else st.text(max_size=10)


def config_law(place: Path, drawn: tuple[type[Config], dict[str, Any]]) -> None:
    """A config is refused with the name of a setting, or is the same again when it is read from what it says."""
    kind, values = drawn
    try:
        config = kind.from_dict(values)
    except SettingError as error:
        told = str(error)
    else:
        told = "."
        assert kind.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert told.endswith((".", "?")), told


@st.composite
def words(draw: Any) -> list[str]:
    """A command with some of its options, and values that are likely or absurd, which finds neither data nor model."""
    name = draw(st.sampled_from([name for name in COMMANDS if name not in ("doctor", "demo", "completion", "pull")]))
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    known = [option for parameter in command.params for option in parameter.opts if option.startswith("-")]
    words = st.text(st.characters(exclude_characters="\0"), max_size=8)  # no system passes that one on
    line = [name]
    for _ in range(draw(st.integers(0, 5))):
        word = draw(st.sampled_from(known) | words)
        if word not in ("-h", "--help"):
            line.append(word)
        line += draw(st.lists(st.integers().map(str) | st.floats().map(str) | words, max_size=2))
    nowhere = [option for option in ("--data", "--real", "--model") if option in known]
    return line + [word for option in nowhere for word in (option, "nowhere/at/all")]


def command_line_law(place: Path, line: list[str]) -> None:
    """Any words end with exit code 1 or 2 and a sentence, and no traceback; `runs` may find that there are none."""
    err = io.StringIO()
    before = sys.argv, sys.stderr
    sys.argv, sys.stderr = ["ditcli", *line], err
    try:
        with pytest.raises(SystemExit) as stop:
            run()
    finally:
        sys.argv, sys.stderr = before
    told = err.getvalue()
    assert "fault of ditcli" not in told, told
    if line[0] == "runs" and not stop.value.code:
        assert "no run in" in told or {"-q", "--quiet"} & set(line)
    else:
        assert stop.value.code in (1, 2), told
        assert told.count("Error: ") >= 1


# Files: each is written with what was drawn and read again


def checkpoint_law(place: Path, content: bytes) -> None:
    path = place / "x.safetensors"
    path.write_bytes(content)
    if is_checkpoint(path):
        _refused_or(DitcliError, read_model_config, path)
    _refused_or(DitcliError, load_dit, path)


def header_law(place: Path, header: Any) -> None:
    """A safetensors file whose header was changed, as JSON."""
    text = json.dumps(header).encode()
    checkpoint_law(place, struct.pack("<Q", len(text)) + text + bytes(4096))


def model_config_law(place: Path, values: Any) -> None:
    """A checkpoint whose own config was changed."""
    tensors = save({}, {"format": "ditcli-1", "config": json.dumps(values)})
    checkpoint_law(place, tensors)


def run_law(place: Path, values: Any) -> None:
    """A run's config.json that was changed, seen by the same command again."""
    made = RunDir(place / "run")
    made.config_file.write_text(json.dumps(values))
    config = TrainConfig(data=str(place / "pictures"), pixels=True)
    _refused_or(DitcliError, check_same_settings, made, config, open_dataset(str(place / "pictures")))


def vae_law(place: Path, values: Any) -> None:
    (place / "vae" / "config.json").write_text(json.dumps(values))
    _refused_or(DitcliError, read_autoencoder, place / "vae")


def manifest_law(place: Path, values: Any) -> None:
    (place / "latents" / "manifest.json").write_text(json.dumps(values))
    found = _refused_or(DitcliError, open_latents, place / "latents")
    if found is not None:
        _refused_or(DitcliError, found.moments)


def idx_law(place: Path, content: bytes) -> None:
    path = place / "train-images-idx3-ubyte"
    path.write_bytes(content)
    array = _refused_or(DataError, read_idx, path, num_dimensions=3)
    if array is not None:
        assert array.ndim == 3
        assert array.size == len(content) - 16


def metadata_law(place: Path, drawn: tuple[str, bytes]) -> None:
    name, content = drawn
    path = place / name
    path.write_bytes(content)
    read = (lambda: read_attributes(path, "Male")[1]) if name.startswith("list") else (lambda: read_metadata(path))
    listing = _refused_or(DataError, read)
    if listing is not None:
        assert all(not file.startswith(("/", "../")) for file in listing.labels)
        assert {label for label in listing.labels.values() if label is not None} <= set(range(len(listing.class_names)))


def picture_law(place: Path, content: bytes) -> None:
    image = _refused_or(UnreadableImageError, read_image, content)
    assert image is None or image.mode == "RGB"
    path = place / "x.png"
    path.write_bytes(content)
    _refused_or(UnreadableImageError, read_png_metadata, path)


def archive_law(place: Path, drawn: tuple[str, bytes]) -> None:
    name, content = drawn
    path = place / name
    path.write_bytes(content)

    def read() -> None:
        side = open_side(str(path), FidConfig(real=str(path), fake="x"))
        list(side.read(range(min(len(side), 3)), 8, 1))

    _refused_or(DitcliError, read)


def _refused_or(refusal: type[Exception], read: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """What it returns; None where it refuses in a sentence of one kind."""
    try:
        return read(*args, **named)
    except refusal as error:
        told = str(error)
    assert told.strip()
    return None


# What is changed and damaged


def png(size: tuple[int, int] = (5, 4)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(np.prod(size) * 3, dtype=np.uint8).reshape(*size, 3)).save(file, "PNG")
    return file.getvalue()


@st.composite
def chunks(draw: Any) -> bytes:
    """A PNG of whole chunks with right checksums, whose content is odd."""
    numbers = st.sampled_from([0, 1, 5, 2**16, 2**31 - 1, 2**32 - 1])
    header = struct.pack(">II", draw(numbers), draw(numbers)) + bytes(
        draw(st.lists(st.integers(0, 17), min_size=5, max_size=5))
    )
    kinds = st.sampled_from([b"PLTE", b"tRNS", b"tEXt", b"iTXt", b"zTXt", b"eXIf", b"iCCP", b"acTL", b"gAMA", b"IDAT"])
    body = [(b"IHDR", header), *draw(st.lists(st.tuples(kinds, st.binary(max_size=40)), max_size=4))]
    body += [(b"IDAT", zlib.compress(bytes(draw(st.integers(0, 300))))), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in body
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@st.composite
def idx_files(draw: Any) -> bytes:
    lengths = draw(st.lists(st.integers(0, 4) | st.sampled_from([2**16, 2**32 - 1]), min_size=2, max_size=4))
    magic = draw(st.just(b"\0\0\x08\x03") | st.binary(min_size=4, max_size=4))
    return magic + b"".join(struct.pack(">I", length) for length in lengths) + draw(st.binary(max_size=80))


@st.composite
def listings(draw: Any) -> tuple[str, bytes]:
    name = draw(st.sampled_from(["metadata.jsonl", "metadata.csv", "list_attr_celeba.txt", "list_attr_celeba.csv"]))
    file = draw(
        st.sampled_from(["a.png", "b/c.png", "../d.png", "/etc/passwd", "..", "", "a.png\0"]) | st.text(max_size=6)
    )
    label = draw(st.sampled_from(["1", "-1", "0", "cat", ""]) | st.text(max_size=4))
    line = {
        "metadata.jsonl": json.dumps({"file_name": file, "label": draw(VALUES | st.just(label))}),
        "metadata.csv": f"file_name,label\n{file},{label}",
        "list_attr_celeba.txt": f"1\nMale Smiling\n{file} {label} 1",
        "list_attr_celeba.csv": f"image_id,Male\n{file},{label}",
    }[name].encode("utf-8", "surrogatepass")
    content = draw(st.just(line) | st.just(line + b"\n" + line) | damaged(line) | st.binary(max_size=60))
    return name, content


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("fuzz")
    make_run(place / "run")
    make_latent_run(place, TINY)
    (place / "pictures").mkdir()
    (place / "pictures" / "a.png").write_bytes(png())
    (place / "latents").mkdir()
    (place / "latents" / "names.json").write_text('["a"]')
    np.save(place / "latents" / "moments.npy", np.zeros((1, 1, 4, 2, 2), np.float16))
    np.save(place / "latents" / "labels.npy", np.zeros(1, np.int64))
    return place


def laws(place: Path) -> dict[str, tuple[st.SearchStrategy[Any], Callable[[Path, Any], None]]]:
    checkpoint = (whole := RunDir(place / "run").newest_checkpoint()).read_bytes()
    header = json.loads(checkpoint[8 : 8 + struct.unpack("<Q", checkpoint[:8])[0]])
    model = json.loads(header["__metadata__"]["config"])
    manifest: dict[str, Any] = {"num": 1, "shape": [1, 4, 2, 2], "dtype": "float16", "per_image": False}
    manifest |= {"files": ["moments.npy"], "class_names": ["cat"], "unreadable": [], "vae": "vae", "codec": "x"}
    manifest |= {"image_size": 8, "fingerprint": "y", "latents_mean": 0.0, "latents_std": 1.0}
    about = {
        "train": TrainConfig(data="x", pixels=True).to_dict(),
        "model": model,
        "data": {"layout": "flat folder", "images": 1, "classes": [], "fingerprint": "z"},
    }
    zipped, packed = io.BytesIO(), io.BytesIO()
    np.savez(packed, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    np.savez(zipped, mu=np.zeros(3), sigma=np.eye(3))
    assert state_file(whole).is_file()
    return {
        "config": (settings_of_a_config(), config_law),
        "command line": (words(), command_line_law),
        "checkpoint": (damaged(checkpoint), checkpoint_law),
        "header": (changed_json(header), header_law),
        "model config": (changed_json(model), model_config_law),
        "run": (changed_json(about), run_law),
        "VAE": (changed_json(json.loads((place / "vae" / "config.json").read_text())), vae_law),
        "manifest": (changed_json(manifest), manifest_law),
        "idx": (idx_files(), idx_law),
        "metadata": (listings(), metadata_law),
        "picture": (damaged(png()) | chunks(), picture_law),
        "archive": (
            st.tuples(st.sampled_from(["x.npz", "x.zip"]), damaged(packed.getvalue()) | damaged(zipped.getvalue())),
            archive_law,
        ),
    }


NAMES = (
    *("config", "command line", "checkpoint", "header", "model config", "run", "VAE", "manifest", "idx", "metadata"),
    *("picture", "archive"),
)


def hold(name: str, place: Path, examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw examples of a law's input and see that it holds; without DITCLI_FUZZ_EXAMPLES always the same ones."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    strategy, law = laws(place)[name]
    quiet = settings(
        max_examples=examples,
        derandomize=not CHOSEN,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    @quiet
    @given(strategy)
    def holds(drawn: Any) -> None:
        law(place, drawn)

    holds()


@pytest.mark.parametrize("name", NAMES)
def test_seconds(name, place, monkeypatch) -> None:
    hold(name, place, EXAMPLES, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_minutes(name, place, monkeypatch) -> None:
    hold(name, place, EXAMPLES * MINUTES, monkeypatch)


def test_every_law_is_walked(place) -> None:
    assert tuple(laws(place)) == NAMES
