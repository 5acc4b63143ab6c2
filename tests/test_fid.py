"""`ditcli fid`: what a score depends on, and what it must not depend on, through the command as users meet it."""

from __future__ import annotations

import hashlib
import http.server
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from golden import inception_state
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageFilter
from safetensors.numpy import load_file

from ditcli.cli import main
from ditcli.config import FidConfig, TrainConfig
from ditcli.errors import DitcliError, SettingError
from ditcli.evaluation import inception
from ditcli.evaluation.extractors import fetch_weights, find_weights
from ditcli.evaluation.sides import open_side, spread_labels
from ditcli.evaluation.statistics import Statistics
from ditcli.images import fit_square
from ditcli.processes import Processes
from ditcli.runs import RunDir, read_model_config
from ditcli.training.best import BestWeights, scores_of
from ditcli.training.metrics import DiffusionRow, read_metrics, smooth
from ditcli.training.train import train
from ditcli.training.writer import Writer

WIDTH = 12


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file of a small random network: pictures of any size -> 12 features."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((16, 3, 3, 3)) / 3,
        "b1": rng.standard_normal(16) / 3,
        "w2": rng.standard_normal((WIDTH, 16, 3, 3)) / 6,
        "axes": np.array([2, 3]),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["a"], strides=[2, 2]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("ReduceMean", ["d", "axes"], ["features"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", WIDTH])],
        [
            numpy_helper.from_array(value.astype(np.int64 if name == "axes" else np.float32), name)
            for name, value in weights.items()
        ],
    )
    path = tmp_path_factory.mktemp("network") / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.fixture
def ditcli(monkeypatch, capsys):
    """``ditcli(*words)`` -> exit code, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ditcli", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main.run()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return stop.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def fid(ditcli, network):
    """``fid(real, fake, *words)`` -> the JSON result, in the small network's features unless words say otherwise."""

    def call(real: object, fake: object, *words: object) -> dict:
        features = () if "--features" in words or "--weights" in words else ("--features", network)
        code, out, err = ditcli("fid", "--real", real, "--fake", fake, *features, *words, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


def values(result: dict) -> dict[str, float]:
    return {key: score["value"] for key, score in result["scores"].items()}


def pictures(seed: int, num: int, height: int = 24, width: int = 24) -> list[np.ndarray]:
    """Smooth random colours."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (num, 6, 6, 3), dtype=np.uint8)
    return [np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)) for image in small]


def write(folder: Path, images: list[np.ndarray], suffix: str = "png", start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images, start):
        Image.fromarray(image).save(folder / f"{i:03}.{suffix}")
    return folder


def write_zip(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder))
    return path


# The command against the reference


def test_the_command_finds_the_references_features_and_distance(ditcli, tmp_path):
    """Pictures as PNGs, generated weights: torch-fidelity's and pytorch-fid's features, and their exact distance."""
    golden = load_file(Path(__file__).parent / "golden" / "fid_inception.safetensors")
    torch.save(inception_state(), "inception.pth")
    shown = [golden[f"in.image{i}_u8"].transpose(1, 2, 0) for i in (0, 2)]
    write(tmp_path / "real", shown)
    write(tmp_path / "fake", [np.ascontiguousarray(image[:, ::-1]) for image in shown])
    for resize, key in (
        ("torch-fidelity", "out.torch_fidelity_2048"),
        ("pytorch-fid", "out.pytorch_fid_2048"),
    ):
        words = ("--weights", "inception.pth", "--resize", resize, "--device", "cpu", "--json")
        code, out, err = ditcli("fid", "--real", "real", "--fake", "fake", "--save-stats", "real.npz", *words)
        assert code == 0, err
        result = json.loads(out)
        assert result["extractor"]["resize"] == resize
        assert result["scores"]["fid"]["name"].startswith("FD (inception ")  # other weights than the public ones
        saved = Statistics.load(Path("real.npz"))
        assert np.abs(saved.features - golden[key]).max() < 5e-5
        np.testing.assert_allclose(saved.mu, golden[key].mean(axis=0), rtol=0, atol=5e-5)
        code, out, err = ditcli("fid", "--real", "fake", "--save-stats", "fake.npz", *words)
        assert code == 0, err
        expected = exact_distance(golden[key], Statistics.load(Path("fake.npz")).features)
        assert values(result)["fid"] == pytest.approx(expected, rel=1e-4)
    code, _, err = ditcli("fid", "--real", "real", "--fake", "fake", "--metrics", "is", *words)
    assert code == 1
    assert "at least 10 pictures" in err


def exact_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Frechet distance of two small sets: the trace of the root is the nuclear norm of the product of deviations."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    dx, dy = ((z - z.mean(axis=0)) / np.sqrt(len(z) - 1) for z in (x, y))
    root = np.linalg.svd(dx @ dy.T, compute_uv=False).sum()
    return float(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.sum(dx**2) + np.sum(dy**2) - 2 * root)


def test_the_commands_distance_is_that_of_its_features(fid, tmp_path):
    real, fake = write(tmp_path / "real", pictures(0, 40)), write(tmp_path / "fake", pictures(1, 50))
    found = values(fid(real, fake, "--save-stats", "real.npz"))["fid"]
    fid(fake, real, "--save-stats", "fake.npz")
    features = [Statistics.load(Path(name)).features for name in ("real.npz", "fake.npz")]
    assert [len(rows) for rows in features] == [40, 50]
    assert found == pytest.approx(exact_distance(*features), rel=1e-9)


# Laws


@pytest.mark.parametrize("kind", ["renamed", "class subfolders", "zip", "npz", "statistics", "one thread", "jsonl"])
def test_a_score_does_not_depend_on_how_pictures_are_kept(fid, tmp_path, kind):
    images = pictures(0, 40)
    real, fake = write(tmp_path / "real", pictures(1, 40)), write(tmp_path / "fake", images)
    metrics = ("--metrics", "fid", "pr")
    before = values(fid(real, fake, *metrics))
    words: tuple[object, ...] = ()
    if kind == "renamed":
        shuffled = np.random.default_rng(5).permutation(40)
        other = write(tmp_path / "other", [images[i] for i in shuffled])
    elif kind == "class subfolders":
        other = tmp_path / "other"
        write(other / "cats", images[:13])
        write(other / "dogs" / "small", images[13:])
    elif kind == "zip":
        other = write_zip(tmp_path / "other.zip", fake)
    elif kind == "npz":
        other = tmp_path / "other.npz"
        np.savez(other, np.stack(images), np.arange(40))
    elif kind == "statistics":
        other = tmp_path / "other.npz"
        fid(fake, real, "--save-stats", other)
    elif kind == "jsonl":
        other = shutil.copytree(fake, tmp_path / "other")
        rows = [json.dumps({"file_name": path.name, "label": "x"}) for path in sorted(other.iterdir())]
        (other / "metadata.jsonl").write_text("\n".join(rows))
    else:
        other, words = shutil.copytree(fake, tmp_path / "other"), ("--num-workers", 1)
    after = values(fid(real, other, *metrics, *words))
    assert after["fid"] == pytest.approx(before["fid"], rel=1e-5)
    assert (after["precision"], after["recall"]) == (before["precision"], before["recall"])


def test_twice_the_same_pictures_have_their_mean_and_nearly_their_spread(fid, tmp_path):
    once, real = write(tmp_path / "once", pictures(0, 30)), write(tmp_path / "real", pictures(1, 30))
    twice = shutil.copytree(once, tmp_path / "twice")
    write(twice, pictures(0, 30), start=30)
    fid(once, real, "--save-stats", "once.npz")
    fid(twice, real, "--save-stats", "twice.npz")
    first, second = Statistics.load(Path("once.npz")), Statistics.load(Path("twice.npz"))
    np.testing.assert_allclose(second.mu, first.mu, rtol=1e-6)
    np.testing.assert_allclose(second.sigma, first.sigma * 2 * 29 / 59, rtol=1e-4, atol=1e-9)


def test_pictures_against_themselves(fid, tmp_path):
    folder = write(tmp_path / "a", pictures(0, 30))
    scores = values(fid(folder, shutil.copytree(folder, tmp_path / "b"), "--metrics", "fid,kid,pr"))
    assert scores["fid"] < 1e-6
    assert scores["kid"] < 0.001
    assert scores["precision"] == scores["recall"] == 1


def test_real_pictures_are_made_as_large_as_the_fakes(fid, tmp_path):
    large, fake = write(tmp_path / "large", pictures(0, 30, 40, 60)), write(tmp_path / "fake", pictures(1, 30))
    small = write(tmp_path / "small", [fit_square(Image.fromarray(image), 24) for image in pictures(0, 30, 40, 60)])
    result = fid(large, fake)
    assert values(result) == values(fid(small, fake))
    assert result["real"]["sizes"] == {"60x40": 30}
    assert (result["real"]["image_size"], result["fake"]["image_size"]) == (24, None)
    assert values(fid(large, fake, "--image-size", 16)) != values(result)


def test_what_makes_scores_hard_to_compare_is_said(fid, tmp_path):
    square, oblong = write(tmp_path / "square", pictures(0, 20)), write(tmp_path / "oblong", pictures(1, 20, 20, 28))
    jpeg = write(tmp_path / "jpeg", pictures(2, 20), "jpg")
    large = write(tmp_path / "large", pictures(2, 20, 40, 40))
    for real, fake, said, unsaid in (
        (square, oblong, "differ in size (24x24 and 28x20)", "JPEG"),
        (jpeg, square, "only " + str(jpeg), "differ in size"),
        (square, jpeg, "only " + str(jpeg), "differ in size"),
        (square, large, "enlarged, such as 24x24", "differ in size"),
        (oblong, square, "only 20 pictures", "differ in size"),
    ):
        notes = " ".join(fid(real, fake)["notes"])
        assert said in notes
        assert unsaid not in notes


def test_the_text_says_how_pictures_were_treated(ditcli, network, tmp_path):
    write(tmp_path / "real", pictures(0, 20, 40, 60), "jpg")
    write(tmp_path / "fake", pictures(1, 20))
    (tmp_path / "fake" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    code, out, err = ditcli("fid", "--real", "real", "--fake", "fake", "--features", network, "--metrics", "fid,kid")
    assert code == 0, err
    lines = dict(line.split(None, 1) if line[0] in "rf" else line.split("  ", 1) for line in out.splitlines())
    assert list(lines) == ["FD (small)", "KD (small)", "real", "fake", "features"]
    assert float(lines["FD (small)"]) > 0
    assert "± " in lines["KD (small)"]
    assert lines["real"] == (
        "real (flat folder): 20 pictures, 60x40, JPEG; centre square resized to 24x24 (Pillow bicubic, antialiased)"
    )
    assert lines["fake"] == "fake (flat folder): 20 pictures, 24x24, 1 unreadable left out; as they are"
    assert "sha256 " in lines["features"]
    assert "Left out 1 unreadable of fake: broken.png" in err
    assert "look at KID" in err


# Models and codecs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["DITCLI_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    settings = {"data": "fashion-mnist", "pixels": True, "image_size": 28, "model": "DiT-S/4", "width": 32, "depth": 2}
    settings |= {"num_heads": 2, "batch_size": 16, "steps": 2, "sample_every": 0, "device": "cpu", "precision": "fp32"}
    return train(TrainConfig.from_dict(settings | {"out": str(tmp_path_factory.mktemp("run"))})).path


def test_a_model_is_scored_by_what_it_draws(ditcli, fid, run, tmp_path):
    """The pictures that `ditcli sample` writes with the same seeds, whatever the batch."""
    words = ("--steps", 3, "--cfg", 2)
    for k, label in enumerate(sorted([*range(10), *range(10)])):
        code, _, err = ditcli("sample", "--model", run, "--labels", label, "--seed", 7 + k, "--out", "drawn", *words)
        assert code == 0, err
    real = write(tmp_path / "real", pictures(0, 20, 40, 40))
    drawn = fid(real, "drawn")
    for batch_size in (5, 16):
        scored = fid(real, run, "--num", 20, "--seed", 7, "--batch-size", batch_size, *words)
        assert values(scored)["fid"] == pytest.approx(values(drawn)["fid"], rel=1e-5)
    assert scored["fake"]["sizes"] == {"28x28": 20}
    assert scored["real"]["image_size"] == 28
    assert scored["fake"]["layout"] == "model of step 2, cfg 2, 3 steps of ddim, precision fp32"


def test_a_model_between_convolutions_is_scored_too(fid, tmp_path):
    settings = {"data": "fashion-mnist", "model": "conv-dit", "image_size": 28, "conv_widths": (8, 4), "patch_size": 1}
    settings |= {"width": 32, "depth": 1, "num_heads": 2, "batch_size": 4, "steps": 1, "sample_every": 0}
    path = train(TrainConfig.from_dict(settings | {"device": "cpu", "out": str(tmp_path / "conv")})).path
    scored = fid(write(tmp_path / "real", pictures(0, 20, 40, 40)), path, "--num", 20, "--steps", 2)
    assert scored["fake"]["sizes"] == {"28x28": 20}
    assert values(scored)["fid"] > 0


def test_labels_are_drawn_as_often_as_the_data_has_them():
    assert spread_labels([1, 1], 4) == [0, 0, 1, 1]
    for counts in ([2517, 2042], [1, 0, 7], [5]):
        for num in (2, 9, 1000):
            found = np.bincount(spread_labels(counts, num), minlength=len(counts))
            assert np.abs(found - num * np.array(counts) / sum(counts)).max() <= 1


def test_the_floor_of_pixels_is_zero_and_that_of_a_vae_is_not(ditcli, network, tmp_path, shared):
    real = write(tmp_path / "real", pictures(0, 20, 40, 40))
    floors = []
    for codec in ("pixels", shared / "weights" / "taesd"):
        words = ("--real", real, "--codec", codec, "--features", network, "--image-size", 32, "--json")
        code, out, err = ditcli("fid", *words)
        assert code == 0, err
        result = json.loads(out)
        assert (result["scores"], result["fake"]) == ({}, None)
        floors.append({key: score["value"] for key, score in result["floor"].items()})
        again = json.loads(ditcli("fid", *words)[1])  # from the cache
        assert again == result
    assert abs(floors[0]["fid"]) < 1e-6 < 1e-3 < floors[1]["fid"]


# In training


def train_small(out: Path, data: Path, **changes) -> RunDir:
    settings = {"data": str(data), "pixels": True, "image_size": 16, "model": "DiT-S/4", "width": 32, "depth": 2}
    settings |= {"num_heads": 2, "batch_size": 8, "steps": 12, "sample_every": 0, "device": "cpu", "precision": "fp32"}
    settings |= {"log_every": 2, "checkpoint_every": 6, "lr": 3e-3, "out": str(out)}
    return train(TrainConfig.from_dict(settings | changes))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "data" / "cats", pictures(0, 30))
    write(tmp_path / "data" / "dogs", pictures(1, 10))
    return tmp_path / "data"


def test_training_writes_scores_that_the_command_finds_too_and_keeps_the_best(fid, network, data, tmp_path):
    for metric in ("fid", "kid"):
        scored = {"eval_every": 5, "eval_num": 16, "eval_steps": 4, "eval_cfg": 2.0, "eval_metric": metric}
        run = train_small(tmp_path / metric, data, eval_features=str(network), **scored)
        name = f"{'FD' if metric == 'fid' else 'KD'} (small) of 16 samples, cfg 2, 4 steps"
        scores = scores_of(run.scores_file, name)
        assert [step for step, _ in scores] == [5, 10, 12]
        rows = read_metrics(run.metrics_file, DiffusionRow)
        last = dict(zip((4, 10, 12), (score for _, score in scores), strict=True))  # rows are of 2, 4, 6, ...
        assert [row.score for row in rows] == [pytest.approx(last[r.step]) if r.step in last else None for r in rows]
        words = ("--num", 16, "--steps", 4, "--cfg", 2, "--device", "cpu", "--metrics", metric)
        found = fid(data, run.checkpoint_file(12), *words)
        assert values(found)[metric] == pytest.approx(scores[-1][1], rel=1e-4)
        best = min(scores, key=lambda row: row[1])
        assert read_model_config(run.best_file).step == best[0]
        assert values(fid(data, run.best_file, *words))[metric] == pytest.approx(best[1], rel=1e-4)


def test_scoring_changes_nothing_that_is_learnt_and_goes_on_where_it_stopped(network, data, tmp_path):
    scored = {"eval_every": 4, "eval_num": 6, "eval_steps": 2, "eval_features": str(network)}
    plain = train_small(tmp_path / "plain", data)
    whole = train_small(tmp_path / "whole", data, **scored)
    train_small(tmp_path / "halves", data, steps=8, **scored)
    halves = train_small(tmp_path / "halves", data, **scored)
    last = [load_file(run.checkpoint_file(12)) for run in (plain, whole, halves)]
    best = [load_file(run.best_file) for run in (whole, halves)]
    for first, *others in (last, best):
        assert all(np.array_equal(first[key], other[key]) for key in first for other in others)
    assert whole.scores_file.read_text() == halves.scores_file.read_text()
    whole.scores_file.write_text(whole.scores_file.read_text() + "16,0.0\n2")  # of a killed run, half-written
    train_small(tmp_path / "whole", data, steps=13, **scored)
    assert [line.split(",")[0] for line in whole.scores_file.read_text().split()[-4:]] == ["4", "8", "12", "13"]


def test_without_an_extractor_the_best_weights_are_those_of_the_lowest_loss(data, tmp_path):
    run = train_small(tmp_path / "run", data, keep_checkpoints=0)
    assert not run.scores_file.exists()
    rows = read_metrics(run.metrics_file)
    losses = dict(zip((row.step for row in rows), smooth([row.loss for row in rows]), strict=True))
    best = min(run.saved_steps(), key=losses.__getitem__)
    assert run.best_file.read_bytes() == run.checkpoint_file(best).read_bytes()
    # Going on with a loss that is worse, then better, than that of the best step.
    rows = [row for row in rows if row.step <= best]
    writer = Writer()
    weights = BestWeights(run, best, writer)
    for step, loss, kept in ((100, 9.0, best), (200, 0.1, 200), (300, 0.2, 200)):
        rows += [replace(rows[-1], step=step - k, loss=loss) for k in reversed(range(50))]
        path = run.checkpoint_file(step)
        shutil.copy(run.checkpoint_file(best), path)
        weights.judge_loss(step, rows, save=lambda: pytest.fail("the checkpoint is there"))
        writer.finish()
        assert run.best_file.samefile(run.checkpoint_file(kept))
        assert weights.step == kept


def test_a_score_that_cannot_be_computed_stops_before_training(data, tmp_path):
    for settings, sentence in (
        ({"eval_every": 2, "eval_features": "none.onnx"}, "there is no such file"),
        ({"eval_every": 2, "eval_weights": "none.pth"}, "none.pth: cannot be read"),
        ({"eval_num": 9}, "eval-num is 9, but must be left out without --eval-every"),
        ({"eval_every": 2, "eval_features": "a.onnx", "eval_weights": "a.pth"}, "eval-weights is 'a.pth'"),
    ):
        with pytest.raises(DitcliError, match=sentence):
            train_small(tmp_path / "run", data, **settings)
    assert not RunDir(tmp_path / "run").metrics_file.exists()


# The cache


def test_features_are_known_as_long_as_pictures_stay_the_same(fid, ditcli, tmp_path):
    real, fake = write(tmp_path / "real", pictures(0, 20)), write(tmp_path / "fake", pictures(1, 20))
    before = fid(real, fake)
    kept = sorted((tmp_path / "cache" / "statistics").iterdir())
    assert len(kept) == 2
    file = fake / "007.png"
    times, size = file.stat(), file.stat().st_size
    file.write_bytes(b"x" * size)  # unnoticed, as its time is put back: so the pictures were not read again
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fid(real, fake) == before
    os.utime(file)
    changed = fid(real, fake)
    assert changed["fake"]["count"] == 19
    assert changed["fake"]["unreadable"][0].startswith("007.png")
    assert changed["real"] == before["real"]
    for path in kept:
        path.write_bytes(path.read_bytes()[:200])  # as if cut
    assert fid(real, fake) == changed


# Archives


def test_a_zip_writes_nothing_and_leaves_out_what_is_no_picture(fid, tmp_path):
    real, fake = write(tmp_path / "real", pictures(0, 20)), write(tmp_path / "fake", pictures(1, 20))
    expected = fid(real, fake)
    path = write_zip(tmp_path / "fake.zip", fake)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../evil.png", (fake / "000.png").read_bytes())
        archive.writestr("/evil.png", (fake / "000.png").read_bytes())
        archive.writestr("broken.png", b"nothing")
        for name in ("__MACOSX/._000.png", ".hidden.png", "notes.txt", "folder/", "no_suffix"):
            archive.writestr(name, b"nothing")
    before = sorted(tmp_path.rglob("*"))
    result = fid(real, path)
    assert result["fake"]["count"] == 22
    assert [text.split(":")[0] for text in result["fake"]["unreadable"]] == ["broken.png"]
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before and "cache" not in p.parts] == []
    assert not (tmp_path.parent / "evil.png").exists()
    assert values(result) != values(expected)


def test_a_zip_that_unpacks_to_too_much_is_refused(ditcli, network, tmp_path):
    real = write(tmp_path / "real", pictures(0, 4))
    with zipfile.ZipFile("bomb.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for i in range(5):
            archive.writestr(f"{i}.bmp", bytes(1 << 26))
    code, _, err = ditcli("fid", "--real", real, "--fake", "bomb.zip", "--features", network)
    assert code == 1
    assert "more than 100 times its size" in err


# Wrong input


def test_wrong_input_is_a_sentence(ditcli, network, tmp_path):
    write(tmp_path / "real", pictures(0, 20))
    write(tmp_path / "one", pictures(0, 1))
    write(tmp_path / "three", pictures(0, 3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"no picture")
    Path("text.zip").write_text("nothing")
    Path("text.npz").write_text("nothing")
    with zipfile.ZipFile("bare.zip", "w") as archive:
        archive.writestr("notes.txt", "nothing")
    np.savez("other.npz", np.zeros((3, 8, 8), np.uint8))
    np.savez("float.npz", np.zeros((3, 8, 8, 3), np.float32))
    np.savez("named.npz", samples=np.zeros((3, 8, 8, 3), np.uint8))
    np.savez("wide.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez("nan.npz", mu=np.full(WIDTH, np.nan), sigma=np.eye(WIDTH))
    np.savez("bare.npz", mu=np.zeros(WIDTH), sigma=np.eye(WIDTH))
    np.savez("alien.npz", mu=np.zeros(WIDTH), sigma=np.eye(WIDTH), extractor="inception")
    whole = Path("whole.npz")
    np.savez(whole, np.stack(pictures(0, 9)))
    Path("cut.npz").write_bytes(whole.read_bytes()[:5000])
    for fake, words, code, sentence in (
        ("one", (), 1, "one has 1 usable pictures, but a score needs at least 2"),
        ("broken", (), 1, "broken has 0 usable pictures (3 could not be read)"),
        ("empty", (), 1, "there are no pictures in empty"),
        ("missing", (), 1, "there is no missing: give a folder, a .zip, an .npz, a run or a checkpoint"),
        ("text.zip", (), 1, "text.zip is no zip archive"),
        ("bare.zip", (), 1, "there are no pictures in bare.zip"),
        ("text.npz", (), 1, "text.npz cannot be read as an .npz"),
        ("cut.npz", (), 1, "cut.npz cannot be read as an .npz"),
        ("other.npz", (), 1, "arr_0 of other.npz is uint8 (3, 8, 8)"),
        ("float.npz", (), 1, "arr_0 of float.npz is float32"),
        ("named.npz", (), 1, "named.npz holds neither pictures (arr_0) nor statistics"),
        ("wide.npz", (), 1, "wide.npz holds features of width 5, but those of small have 12"),
        ("nan.npz", (), 1, "nan.npz holds NaN"),
        ("alien.npz", (), 1, "alien.npz was made with inception, but this is small"),
        ("bare.npz", ("--metrics", "kid"), 2, "bare.npz holds only mu and sigma"),
        ("three", ("--metrics", "pr"), 1, "at least 4 pictures"),
        ("three", ("--metrics", "fdi"), 2, "Did you mean 'fid'?"),
        ("three", ("--metrics", "is"), 2, "which only --features inception has"),
        ("three", ("--num", "9"), 2, "num is 9, but neither side is a model"),
        ("three", ("--resize", "pytorch-fid"), 2, "resize is 'pytorch-fid', but must be left out"),
        ("three", ("--save-stats", "x"), 2, "save-stats is 'x', but must be a name that ends with .npz"),
        ("three", ("--codec", "nothing"), 1, "there is no 'nothing': give a VAE's folder"),
        ("three", ("--image-size", "0"), 2, "image-size is 0"),
    ):
        found, _, err = ditcli("fid", "--real", "real", "--fake", fake, "--features", network, *words)
        told = [line for line in err.splitlines() if line.startswith("Error: ")]
        assert found == code, (fake, words, err)
        assert len(told) == 1, (fake, words, err)
        assert sentence in told[0]
    for words, sentence in (
        (("--real", "real"), "fake is None, but must be given"),
        (("--fake", "real"), "Missing option '--real'"),
        (("--real", "real", "--fake", "real", "--features", "dinov3"), "must be inception, dinov2 or an ONNX file"),
        (("--real", "bare.npz", "--save-stats", "x.npz", "--features", network), "save-stats needs pictures"),
        (("--real", "real", "--fake", "real", "--weights", "none.pth"), "none.pth: cannot be read"),
    ):
        found, _, err = ditcli("fid", *words)
        assert found in (1, 2)
        assert sentence in err


def test_statistics_without_an_extractor_are_taken_with_a_note(fid, tmp_path):
    real = write(tmp_path / "real", pictures(0, 20))
    np.savez("adm.npz", mu=np.zeros(WIDTH), sigma=np.eye(WIDTH))
    result = fid("adm.npz", real)
    assert list(result["scores"]) == ["fid"]
    assert any("does not say which extractor" in note for note in result["notes"])


def test_features_that_are_not_numbers_are_refused(ditcli, tmp_path):
    write(tmp_path / "real", pictures(0, 4))
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
            helper.make_node("Neg", ["mean"], ["below"]),
            helper.make_node("Log", ["below"], ["features"]),
        ],
        "nan",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), "nan.onnx")
    code, _, err = ditcli("fid", "--real", "real", "--fake", "real", "--features", "nan.onnx")
    assert code == 1
    assert "4 of 4 pictures are NaN" in err


def test_settings_are_checked_before_anything_is_opened():
    for settings, sentence in (
        ({"real": "a", "fake": "b", "metrics": ["fid,kdi"]}, "Did you mean 'kid'"),
        ({"real": "a", "fake": "b", "num": 1}, "num is 1"),
        ({"real": "a", "save_stats": "s.npz", "metrics": ["is"]}, "without `is` where there is no --fake"),
    ):
        with pytest.raises(SettingError, match=sentence):
            FidConfig.from_dict(settings)
    assert FidConfig.from_dict({"real": "a", "fake": "b", "metrics": ["fid,KID", "fid"]}).metrics == ("fid", "kid")


# Several processes


def test_parts_of_a_side_make_the_whole(run, tmp_path):
    folder = write(tmp_path / "folder", pictures(0, 9, 40, 30))
    np.savez("side.npz", np.stack(pictures(0, 9)))
    write_zip(tmp_path / "side.zip", folder)
    config = FidConfig(real="a", fake="b", num=9, steps=2, device="cpu")
    for name in ("folder", "side.npz", "side.zip", str(run)):
        side = open_side(name, config)
        whole = list(side.read(range(9), 16, 2))
        parts = [picture for rank in range(4) for picture in side.read(Processes(rank, 4).part(9), 16, 2)]
        assert [picture.size for picture in parts] == [picture.size for picture in whole]
        np.testing.assert_array_equal([p.pixels for p in parts], [p.pixels for p in whole])


def test_several_processes_find_what_one_finds(fid, network, tmp_path):
    real = write(tmp_path / "real", pictures(0, 31, 40, 40))
    (real / "007.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    np.savez("fake.npz", np.stack(pictures(1, 33)))
    words = ["--metrics", "fid,kid,pr", "--features", str(network), "--json"]
    alone = fid(real, "fake.npz", *words)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    shared = subprocess.run(
        [sys.executable, *launcher, "ditcli", "fid", "--real", str(real), "--fake", "fake.npz", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DITCLI_CACHE": str(tmp_path / "another")},
        capture_output=True,
        text=True,
    )
    assert shared.returncode == 0, shared.stderr
    together = json.loads(shared.stdout)
    assert {key: together[key] for key in ("real", "fake")} == {key: alone[key] for key in ("real", "fake")}
    for key, value in values(alone).items():
        assert values(together)[key] == pytest.approx(value, rel=1e-5, abs=1e-9)


# The public weights


class Server(http.server.BaseHTTPRequestHandler):
    """Gives the right file at /right and as the Hub does, another file at /other, nothing elsewhere."""

    FILES: ClassVar = {
        "/right.pth": b"the weights",
        "/other.pth": b"another file",
        "/someone/scores/resolve/main/inception.pth": b"the weights",
    }

    def do_HEAD(self) -> None:
        content = self.FILES.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("ETag", '"abc"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.FILES.get(self.path, b""))

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


def test_weights_are_fetched_once_and_their_hash_is_checked(server, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "PUBLIC_URLS", (f"{server}/other.pth", f"{server}/none.pth"))
    with pytest.raises(DitcliError, match=r"another file, with sha256 .*Not Found.*--weights"):
        fetch_weights()
    assert list((tmp_path / "cache" / "weights").iterdir()) == []
    monkeypatch.setattr(inception, "PUBLIC_SHA256", hashlib.sha256(b"the weights").hexdigest())
    monkeypatch.setattr(inception, "PUBLIC_URLS", (f"{server}/other.pth", f"{server}/right.pth"))
    path = fetch_weights()
    assert path.read_bytes() == b"the weights"
    monkeypatch.setattr(inception, "PUBLIC_URLS", ("http://127.0.0.1:9/right.pth",))
    assert fetch_weights() == path  # no server is asked again
    path.unlink()
    with pytest.raises(DitcliError, match="refused"):
        fetch_weights()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "right.pth").write_bytes(b"the weights")  # as another tool left it
    assert fetch_weights().name == "right.pth"


def test_weights_come_from_the_hub_by_name(server, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", server)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server + "/{repo_id}/resolve/{revision}/{filename}")
    assert find_weights("someone/scores/inception.pth").read_bytes() == b"the weights"
    with pytest.raises(DitcliError, match="the Hub does not give it"):
        find_weights("someone/scores/none.pth")


# Real pictures


def test_real_halves_are_near_and_blur_and_noise_are_far(fid, shared, tmp_path):
    names = sorted((shared / "data" / "celeba" / "img_align_celeba").iterdir())[:300]
    rng = np.random.default_rng(0)

    def noisy(image: Image.Image) -> Image.Image:
        return Image.fromarray(
            (np.array(image) + rng.normal(0, 40, (image.height, image.width, 3))).clip(0, 255).astype(np.uint8)
        )

    worse = {
        "half": lambda image: image,
        "blur1": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
        "blur3": lambda image: image.filter(ImageFilter.GaussianBlur(3)),
        "noise": noisy,
    }
    for name, change in {"real": lambda image: image, **worse}.items():
        (tmp_path / name).mkdir()
        for file in names[0::2] if name == "real" else names[1::2]:
            change(Image.open(file)).save(tmp_path / name / f"{file.stem}.png", compress_level=1)
    features = shared / "weights" / "efficientnet_lite0_features.onnx"
    results = [fid("real", name, "--features", features) for name in worse]
    kernel = [result["scores"]["kid"] for result in results]
    assert abs(kernel[0]["value"]) < kernel[0]["deviation"]
    for distances in ([score["value"] for score in kernel], [values(result)["fid"] for result in results]):
        assert all(better < worse for better, worse in itertools.pairwise(distances)), distances
