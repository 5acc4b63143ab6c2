"""The command line as a user meets it: options, layers of settings, sentences and exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditcli.cli import main
from ditcli.config import PRESETS, SampleConfig, TrainConfig
from ditcli.images import read_png_metadata
from ditcli.sampling import file_names, find_labels

TINY = (
    "--preset paper --data fashion-mnist --pixels --image-size 28 --model DiT-S/4 --width 32 --depth 2 --num-heads 2 "
    "--batch-size 16 --steps 6 --sample-every 0 --device cpu --precision fp32"
).split()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A working folder with a trained run in it."""
    folder = tmp_path_factory.mktemp("place")
    os.environ["DITCLI_CACHE"] = str(folder / "cache")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)
    del os.environ["DITCLI_CACHE"]


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    sys.argv = ["ditcli", "train", *TINY, "--out", "runs/tiny"]
    with pytest.raises(SystemExit) as stop:
        main.run()
    assert not stop.value.code
    return place / "runs" / "tiny"


@pytest.fixture
def ditcli(place: Path, monkeypatch, capsys):
    """``ditcli(*words)`` -> exit code, stdout, stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ditcli", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main.run()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return stop.value.code or 0, captured.out, captured.err

    return call


def test_training_prints_the_run_folder_and_resumes_as_the_same_command(ditcli, run):
    code, out, err = ditcli("train", *TINY, "--out", "runs/tiny")
    assert (code, out.strip()) == (0, "runs/tiny")
    assert "already has 6 steps" in err


def test_samples_are_named_by_label_and_seed_and_carry_their_settings(ditcli, run, place):
    code, out, err = ditcli(
        "sample", "--labels", "sneaker", "bag", "--num", "2", "--seed", "5", "--steps", "3", "--grid"
    )
    assert code == 0, err
    names = ["sneaker_seed5", "sneaker_seed6", "bag_seed5", "bag_seed6", "grid"]
    assert out.split() == [f"samples/{name}.png" for name in names]
    facts = json.loads(read_png_metadata(place / "samples" / "bag_seed6.png")["ditcli"])
    assert (facts["label"], facts["seed"], facts["cfg"], facts["steps"], facts["step"]) == ("bag", 6, 4.0, 3, 6)
    assert np.asarray(Image.open(place / "samples" / "bag_seed6.png")).shape == (28, 28, 3)


@pytest.mark.parametrize("form", [["sneaker", "bag"], ["sneaker,bag"], ["Sneaker", "--labels", "8"], ["7, BAG"]])
def test_every_form_of_labels(ditcli, run, form):
    code, out, err = ditcli("sample", "--labels", *form, "--steps", "1", "--json", "--out", "forms")
    assert code == 0, err
    assert [image["label"] for image in json.loads(out)["images"]] == ["sneaker", "bag"]


def test_without_labels_every_class_is_drawn(ditcli, run):
    _, out, _ = ditcli("sample", "--steps", "1", "--out", "all", "--cfg", "1")
    assert len(out.split()) == 10


def test_an_unknown_label_lists_the_known_and_suggests(ditcli, run):
    code, out, err = ditcli("sample", "--labels", "sneeker")
    assert (code, out) == (2, "")
    assert "'sneeker'" in err
    assert "t-shirt, trouser" in err
    assert "Did you mean 'sneaker'?" in err


def test_the_same_seed_gives_the_same_picture_whatever_the_batch_size(ditcli, run, place):
    for size in ("1", "3", "16"):
        for sampler in ("ddim", "ddpm"):
            where = f"batch-{sampler}-{size}"
            words = ["--num", "5", "--labels", "bag", "--steps", "8", "--sampler", sampler]
            assert ditcli("sample", *words, "--batch-size", size, "--out", where)[0] == 0
    for sampler in ("ddim", "ddpm"):
        for k in range(5):
            name = f"bag_seed{k}.png"
            pictures = [np.asarray(Image.open(place / f"batch-{sampler}-{s}" / name)).astype(int) for s in (1, 3, 16)]
            assert max(np.abs(pictures[0] - other).max() for other in pictures[1:]) <= 1  # a rounding to uint8


def test_ema_and_raw_weights_differ(ditcli, run, place):
    for flag in ("--ema", "--no-ema"):
        assert ditcli("sample", flag, "--labels", "bag", "--steps", "2", "--out", f"weights{flag}")[0] == 0
    first, second = (
        np.asarray(Image.open(place / f"weights{flag}" / "bag_seed0.png")) for flag in ("--ema", "--no-ema")
    )
    assert (first != second).any()


def test_dry_run_prints_sizes_and_writes_nothing(ditcli, place):
    code, out, _ = ditcli("train", *TINY, "--out", "runs/dry", "--dry-run")
    sizes = json.loads(out)
    assert code == 0
    assert sizes["images"] == 6620
    assert sizes["input"] == [3, 28, 28]
    assert sizes["parameters"] > 10_000
    assert not (place / "runs" / "dry").exists()


def test_flag_before_environment_before_file_before_preset_before_default(ditcli, place, monkeypatch):
    from ditcli.cli.options import load_config

    (place / "my.toml").write_text('lr = 2e-4\nbatch-size = 8\nseed = 1\nmodel = "DiT-L/2"\n')
    seen = {}
    from ditcli.cli import train as command

    def keep(config_class, options, **layers):
        seen.update(load_config(config_class, options, **layers).to_dict())
        return load_config(config_class, options, **layers)

    monkeypatch.setattr(command, "load_config", keep)
    monkeypatch.setenv("DITCLI_TRAIN_LR", "3e-4")
    monkeypatch.setenv("DITCLI_TRAIN_BATCH_SIZE", "4")
    words = ["--preset", "mnist", "--config", "my.toml", "--batch-size", "2", "--dry-run", "--data", "fashion-mnist"]
    assert ditcli("train", *words)[0] == 0
    assert seen["batch_size"] == 2  # flag
    assert seen["lr"] == 3e-4  # environment
    assert (seen["seed"], seen["model"]) == (1, "DiT-L/2")  # file
    assert (seen["width"], seen["steps"]) == (PRESETS["mnist"]["width"], PRESETS["mnist"]["steps"])  # preset
    assert seen["ema_decay"] == TrainConfig.ema_decay  # default


@pytest.mark.parametrize(
    ("words", "preset"),
    [
        ([], "fast"),
        (["--preset", "paper"], "paper"),
        (["--schedule", "flow", "--lr", "3e-4"], "fast"),
        (["--schedule", "cosine"], "paper"),
        (["--prediction", "eps"], "paper"),
        (["--prediction", "x0"], "fast"),
        (["--num-timesteps", "500"], "paper"),
        (["--model", "Conv-DiT"], "paper"),
        (["--shard"], "paper"),
        (["--config", "my.toml"], "paper"),
    ],
)
def test_without_a_preset_the_recipe_is_the_fast_one_where_it_fits(ditcli, place, words, preset):
    (place / "my.toml").write_text('schedule = "linear"\n')
    shape = ["--width", "36", "--num-heads", "3", "--depth", "2", "--device", "cpu"]
    data = ["--data", "fashion-mnist", "--image-size", "32", *([] if "Conv-DiT" in words else ["--pixels"])]
    code, out, _ = ditcli("train", *data, *shape, "--dry-run", *words)
    assert code == 0
    sizes = {}
    for name in ("fast", "paper"):  # whose MLPs differ
        code, as_named, _ = ditcli("train", *data, *shape, "--dry-run", *words, "--preset", name)
        sizes[name] = json.loads(as_named)["parameters"] if code == 0 else None
    assert json.loads(out)["parameters"] == sizes[preset]
    assert sizes["fast"] != sizes["paper"]


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["train"], 2, "--data"),
        (["train", "--data", "nowhere"], 1, "nowhere"),
        (["train", *TINY, "--lr", "-1"], 2, "lr is -1.0, but must be positive"),
        (["train", *TINY, "--model", "DiT-M/2"], 2, "DiT-B/2"),
        (["train", *TINY, "--image-size", "30"], 2, "a multiple of 4, the patch size"),
        (["train", *TINY, "--vae", "some/where"], 2, "exclude each other"),
        (["train", *TINY, "--out", "a-file/run"], 1, "Not a directory"),
        (["train", *TINY, "--sample-steps", "2000"], 2, "num-timesteps"),
        (["sample", "--out", "a-file"], 1, "File exists"),
        (["train", *TINY, "--config", "unknown.toml"], 2, "Did you mean 'batch_size'?"),
        (["train", *TINY, "--config", "broken.toml"], 2, "is not TOML"),
        (["train", *TINY, "--preset", "papper"], 2, "papper"),
        (["train", *TINY, "--bacth-size", "3"], 2, "--batch-size"),
        (["trian"], 2, "Did you mean 'train'?"),
        (["sample", "--model", "nowhere"], 1, "nowhere"),
        (["sample", "--model", "broken.safetensors"], 1, "broken.safetensors"),
        (["sample", "--model", "."], 1, "broken.safetensors is damaged"),
        (["sample", "--steps", "5000"], 2, "has only 1000"),
        (["sample", "--labels", "²"], 2, "'²'"),
        (["sample", "--labels"], 2, "at least one value"),
        (["sample", "--eta", "1", "--sampler", "ddpm"], 2, "eta"),
        (["sample", "--device", "tpu"], 2, "tpu"),
    ],
)
def test_wrong_input_is_one_sentence_and_its_exit_code(ditcli, run, place, words, code, sentence):
    (place / "unknown.toml").write_text("batch_sise = 3\n")
    (place / "a-file").write_text("")
    (place / "broken.toml").write_text("lr = = 3\n")
    (place / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{garbage garbage")
    before = sorted(place.rglob("*"))
    found, out, err = ditcli(*words)
    assert (found, out) == (code, ""), err
    assert sentence in err
    assert len([line for line in err.splitlines() if line.startswith("Error")]) == 1
    assert sorted(place.rglob("*")) == before


def test_no_network_and_no_vae_is_one_sentence_that_names_the_ways_out(place):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "no-cache")}
    done = subprocess.run(
        [sys.executable, "-m", "ditcli", "train", "--data", "fashion-mnist"],
        capture_output=True, text=True, env=environment, cwd=place,
    )  # fmt: skip
    assert done.returncode == 1
    assert "stabilityai/sd-vae-ft-ema" in done.stderr
    assert "--vae FOLDER" in done.stderr
    assert "--pixels" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_config_field_is_an_option_with_hyphens():
    import click

    for config_class, command in [(TrainConfig, "train"), (SampleConfig, "sample")]:
        options = {o for p in main.cli.get_command(click.Context(main.cli), command).params for o in p.opts}
        for field in dataclasses.fields(config_class):
            assert f"--{field.name.rstrip('_').replace('_', '-')}" in options


def test_presets_are_valid():
    for name, preset in PRESETS.items():
        config = TrainConfig.from_dict(preset | {"data": "x"})
        shape = (3, 28, 28) if name == "mnist" else (4, 32, 32)
        assert config.dit(input_shape=shape, num_classes=2).depth > 0
    celeba = TrainConfig.from_dict(PRESETS["celeba"] | {"data": "x"})
    assert celeba.dit(input_shape=(4, 32, 32), num_classes=2).depth == 10
    assert (celeba.diffusion().schedule, celeba.diffusion().num_timesteps, celeba.loss) == ("cosine", 500, "l1")


def test_ctrl_c_exits_with_130(place):
    code = (
        "import time, ditcli.cli.main as m\n"
        "m.cli.main = lambda **k: (print('ready', flush=True), time.sleep(60))\nm.run()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_a_broken_pipe_ends_quietly(run, place):
    words = f"{sys.executable} -m ditcli sample --steps 1 --labels bag --num 3 --out pipe 2>err.txt | true"
    subprocess.run(["bash", "-c", words], cwd=place, check=True)
    assert "Traceback" not in (place / "err.txt").read_text()


def test_debug_shows_the_traceback(place):
    done = subprocess.run(
        [sys.executable, "-m", "ditcli", "sample", "--model", "nowhere"],
        capture_output=True, text=True, cwd=place, env=os.environ | {"DITCLI_DEBUG": "1"},
    )  # fmt: skip
    assert "Traceback" in done.stderr


def test_labels_by_exact_name_by_any_case_by_number_and_once():
    names = ("X", "x", "y", "x y", "x-y", "tench, Tinca tinca")
    assert find_labels(["x"], names) == [1]
    assert find_labels(["X"], names) == [0]
    assert find_labels(["Y", "y", "2"], names) == [2]
    assert find_labels(["tench, tinca tinca"], names) == [5]
    assert find_labels([], names) == list(range(6))
    assert len({word.lower() for word in file_names(names)}) == 6
    assert file_names(["cat", "dog/../x"]) == ["cat", "dog-..-x"]
