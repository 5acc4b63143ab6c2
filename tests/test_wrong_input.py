"""Every command with wrong input of every kind: one clear sentence, the right exit code, untouched files.

The commands are those of `COMMANDS` and their options those that click knows, so that a new one is walked too.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
from console import ditcli, full_disk, without_rights
from exports import PIXELS, TINY, make_latent_run, make_run
from PIL import Image
from safetensors.numpy import save_file
from test_dit import random_dit

from ditcli.cli.main import COMMANDS, cli
from ditcli.config import DiTConfig
from ditcli.runs import RunDir
from ditcli.training.checkpoints import write_weights

# Words with which a command would succeed in no time; of one that is not named here the sentence may name what else
# is missing.
RIGHT = {
    "train": "--data pictures --pixels --image-size 8 --model DiT-S/4 --width 32 --depth 1 --num-heads 2 "
    "--batch-size 2 --steps 1 --sample-every 0 --device cpu --precision fp32 --out out",
    "find-lr": "--data pictures --pixels --image-size 8 --model DiT-S/4 --width 32 --depth 1 --num-heads 2 "
    "--prediction flow --batch-size 2 --device cpu --precision fp32 --num-rates 10 --out out.png",
    "sample": "--model model --steps 1 --device cpu --out out",
    "export-onnx": "--model model --out out",
    "fid": "--real pictures --fake pictures --features mean.onnx --metrics fid --device cpu --save-stats out.npz",
    "train-vae": "--data pictures --image-size 8 --lpips none --widths 8 16 --norm-groups 4 --batch-size 2 --steps 1 "
    "--layers-per-block 1 --gan-layers 1 --gan-width 8 --holdout 1 --device cpu --precision fp32 --out out",
    "encode": "--data pictures --vae vae --image-size 16 --device cpu --precision fp32 --out out",
    "decode": "latents.npy --vae vae --device cpu --precision fp32 --out out",
    "push": "model me/model --license mit --dry-run --out out",
    "info": "model",
    "demo": "--steps 1 --device cpu --out out",
}
MODELS = "nowhere empty a-file truncated.safetensors foreign.safetensors misfit.safetensors corrupt code.pt latent/vae"
WRONG = {name: MODELS.split() for name in ("model", "run", "from", "adapter", "guide_model")}
WRONG |= {name: ["nowhere", "empty", "a-file"] for name in ("data", "real", "fake", "latents")}
WRONG |= {name: ["nowhere", "empty", "a-file", "model", "broken-vae"] for name in ("vae", "codec")}
WRONG |= {name: ["nowhere", "empty", "a-file"] for name in ("init", "file", "lpips", "features")}
WRONG |= {
    "name": ["nowhere", "owner/name"],
    "labels": ["zebra"],
    "repo": ["no-owner"],
    "device": ["tpu", "cuda:9"],
}
WITH = {"lpips": ["--reconstruct"]}
# What the right words say must then be left out.
WITHOUT = {
    "vae": ["--pixels"],
    "from": ["--pixels", "--model", "--width", "--depth", "--num-heads"],
}


def parameters(command: str) -> list[click.Parameter]:
    found = cli.get_command(click.Context(cli), command)
    assert found is not None
    return found.params


def named_inputs() -> Iterator[tuple[str, str, str]]:
    """(command, parameter, value)"""
    for command in COMMANDS:
        for parameter in parameters(command) if command != "doctor" else ():  # which reports, and refuses nothing
            for value in WRONG.get(parameter.name or "", ()):
                yield command, parameter.name or "", value


def numbers() -> Iterator[tuple[str, str]]:
    for command in COMMANDS:
        for parameter in parameters(command):
            if isinstance(parameter.type, click.types.IntParamType | click.types.FloatParamType):
                yield command, parameter.opts[0]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """Models, pictures and VAEs, right and wrong ones."""
    place = tmp_path_factory.mktemp("template")
    make_run(place / "model")
    make_latent_run(place / "latent", TINY)
    shutil.copytree(place / "latent" / "vae", place / "vae")
    for k, label in enumerate(("cat", "dog", "cat", "dog")):
        folder = place / "pictures" / label
        folder.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(k).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{k}.png")
    np.save(place / "latents.npy", np.zeros((1, 4, 8, 8), np.float32))
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("GlobalAveragePool", ["x"], ["p"]), onnx.helper.make_node("Flatten", ["p"], ["y"])
    image, features = value("x", 1, ["n", 3, "h", "w"]), value("y", 1, ["n", 3])
    graph = onnx.helper.make_graph(list(node), "mean", [image], [features])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=8),
        place / "mean.onnx",
    )

    (place / "empty").mkdir()
    (place / "a-file").write_text("neither picture nor model\n")
    whole = RunDir(place / "model").newest_checkpoint().read_bytes()
    (place / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"x": np.zeros(3, np.float32)}, place / "foreign.safetensors")
    other = random_dit(DiTConfig(**(PIXELS.dit.to_dict() | {"width": 64})))
    write_weights(place / "misfit.safetensors", other.state_dict(), PIXELS)
    (place / "corrupt").mkdir()
    (place / "corrupt" / "denoiser.onnx").write_bytes(b"\x08\x08garbage" * 20)
    (place / "code.pt").write_bytes(pickle.dumps({"x": print}))
    shutil.copytree(place / "vae", place / "broken-vae")
    weights = place / "broken-vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (place / "closed").mkdir(mode=0o555)
    return place


@pytest.fixture
def place(template, tmp_path_factory, monkeypatch) -> Path:
    """The working folder; the cache and the Hub's lie beside it, and the Hub is out of reach."""
    beside = tmp_path_factory.mktemp("beside")
    monkeypatch.chdir(template)
    monkeypatch.setenv("DITCLI_CACHE", str(beside / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(beside / "hub"))
    return template


def snapshot(place: Path) -> dict[str, str]:
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in place.rglob("*")
    }


def with_value(command: str, name: str, value: str) -> list[str]:
    """The right words of a command, but for one option or argument."""
    words = RIGHT.get(command, "").split()
    parameter = next(parameter for parameter in parameters(command) if name in (parameter.name, *parameter.opts))
    if isinstance(parameter, click.Argument):
        index = [p.name for p in parameters(command) if isinstance(p, click.Argument)].index(parameter.name)
        return [*words[:index], value, *words[index + 1 :]]
    for option in (parameter.opts[0], *WITHOUT.get(name, ())):
        if option in words:
            start = words.index(option)
            end = next((i for i in range(start + 1, len(words)) if words[i].startswith("--")), len(words))
            del words[start:end]
    if command == "encode":
        words += WITH.get(name, [])
    return [*words, f"{parameter.opts[0]}={value}"]


def refuse(capfd, place: Path, words: list[str], world: AbstractContextManager[None] | None = None) -> tuple[int, str]:
    """Run it and see that it is one sentence and no file has changed; exit code and sentence."""
    before = snapshot(place)
    with world or nullcontext():
        done = ditcli(capfd, *words)
    assert done.code in (1, 2), done
    assert done.out == ""
    sentences = [line for line in done.err.splitlines() if line.startswith("Error: ")]
    assert len(sentences) == 1, done.err
    assert "fault of ditcli" not in done.err
    assert "Traceback" not in done.err
    assert snapshot(place) == before
    return done.code, done.err


@pytest.mark.parametrize("command", RIGHT)
def test_the_right_words_are_right(capfd, place, command) -> None:
    """Else what follows would test nothing."""
    if command == "demo":
        pytest.skip("tests/test_demo.py runs it")
    before = snapshot(place)
    done = ditcli(capfd, command, *RIGHT[command].split())
    assert done.code == 0, done.err
    for path in set(snapshot(place)) - set(before):
        shutil.rmtree(place / path, ignore_errors=True)
        (place / path).unlink(missing_ok=True)


@pytest.mark.parametrize(("command", "name", "value"), list(named_inputs()))
def test_what_is_named_is_wrong(capfd, place, command, name, value) -> None:
    if (command, name, value) in FINE:
        pytest.skip("is no mistake there")
    code, told = refuse(capfd, place, [command, *with_value(command, name, value)])
    assert Path(value).stem in told or command not in RIGHT
    if name in ("labels", "repo", "device"):
        assert code == 2 or command not in RIGHT


# Not every wrong input is wrong everywhere.
FINE = {
    ("info", "model", "misfit.safetensors"),  # it describes the config, and reads no weights
}


@pytest.mark.parametrize(("command", "option"), list(numbers()))
@pytest.mark.parametrize("value", ["-7", "1e400", "nan", "many"])
def test_a_number_out_of_range(capfd, place, command, option, value) -> None:
    """Negative, infinite, not a number, no number: refused before anything is opened."""
    code, told = refuse(capfd, place, [command, *with_value(command, option, value)])
    assert code == 2
    assert option.strip("-") in told


def test_an_unknown_option_and_too_many_words(capfd, place) -> None:
    for command in COMMANDS:
        assert refuse(capfd, place, [command, "--no-such-option"])[0] == 2
        if command != "report":  # which takes any number
            assert refuse(capfd, place, [command, "a", "b", "c", "d"])[0] == 2


OUTPUTS = ["train", "sample", "export-onnx", "train-vae", "encode", "decode", "push", "demo"]


@pytest.mark.parametrize("command", OUTPUTS)
def test_a_file_where_a_folder_is_to_be(capfd, place, command) -> None:
    _, told = refuse(capfd, place, [command, *with_value(command, "out", "a-file/inside")])
    assert "a-file" in told


@pytest.mark.parametrize("command", [*OUTPUTS, "fid"])
def test_no_right_to_write(capfd, place, command) -> None:
    name, value = ("save_stats", "closed/out.npz") if command == "fid" else ("out", "closed/out")
    _, told = refuse(capfd, place, [command, *with_value(command, name, value)], without_rights())
    assert "closed" in told


@pytest.mark.parametrize("command", [*OUTPUTS, "fid"])
def test_a_full_disk(capsys, place, command) -> None:
    """No file may grow beyond 100 bytes: what was begun is taken away again, or the sentence says how to go on."""
    name, value = ("save_stats", "full.npz") if command == "fid" else ("out", "full")
    before = snapshot(place)
    with full_disk(100):
        done = ditcli(capsys, command, *with_value(command, name, value))
    assert (done.code, done.out) == (1, ""), done.err
    assert len([line for line in done.err.splitlines() if line.startswith("Error: ")]) == 1, done.err
    assert "fault of ditcli" not in done.err
    after = snapshot(place)
    assert {name: after[name] for name in before} == before
    for path in set(after) - set(before):
        assert not path.endswith((".safetensors", ".png", ".onnx", ".npz")), f"{path} is left half-written"
    for leftover in place.glob("*full*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
