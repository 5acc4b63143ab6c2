"""The bench of recipes: what is held out is never trained on, and a killed bench goes on to the same numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from ditcli.config import TrainConfig
from ditcli.data.folders import FileDataset, open_dataset
from ditcli.data.split import some_of, split_off, subset
from ditcli.errors import SettingError
from ditcli.images import write_png

TINY = [
    *("--pixels", "--image-size", "16", "--width", "16", "--depth", "1", "--num-heads", "1", "--patch-size", "8"),
    *("--images", "2000", "--curve", "0.5", "1", "--seeds", "0", "--samples", "40", "--sample-steps", "4"),
    *("--features", "pixels", "--device", "cpu", "--precision", "fp32", "--variants", "paper"),
    *("--add", "quick: schedule=flow batch_size=20 lr=1e-3"),
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITCLI_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "scripts")
    import bench_quality

    return bench_quality


@pytest.fixture
def recipes(bench):
    import quality_recipes

    return quality_recipes


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """160 plain pictures of two classes, reddish and bluish."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for k in range(160):
        path = folder / ("red" if k % 2 else "blue") / f"{k:03}.png"
        path.parent.mkdir(exist_ok=True)
        image = rng.integers(0, 80, (16, 16, 3)).astype(np.uint8)
        image[..., 0 if k % 2 else 2] += 120
        write_png(path, image)
    return folder


def named(names: list[str]) -> FileDataset:
    labels = np.arange(len(names)) % 2
    return FileDataset(folder=Path("nowhere"), layout="", names=names, labels=labels, class_names=("a", "b"))


def test_what_is_held_out_depends_on_the_name_alone():
    many = named([f"some/{k}.jpg" for k in range(4000)])
    training, held_out = split_off(many, 0.25)
    assert not set(training.names) & set(held_out.names)
    assert {*training.names, *held_out.names} == set(many.names)
    assert len(held_out) / len(many) == pytest.approx(0.25, abs=0.02)
    few = subset(many, range(0, 4000, 7)[::-1])
    assert set(split_off(few, 0.25)[1].names) == set(held_out.names) & set(few.names)
    wanted = dict(zip(many.names, many.labels, strict=True))
    assert [wanted[name] for name in held_out.names] == held_out.labels.tolist()


def test_a_part_of_a_folder_grows_by_others_and_splits_alike():
    many = named([f"{k}.jpg" for k in range(4000)])
    some = some_of(many, 2000)
    assert set(some_of(many, 1000).names) < set(some.names)
    assert len(split_off(some, 0.25)[1]) / 2000 == pytest.approx(0.25, abs=0.03)
    assert some_of(many, 9000).names == many.names


def test_a_subset_of_idx_pictures_has_their_pixels():
    every = open_dataset("fashion-mnist")
    one = subset(every, [3, 40])
    assert one.names == [every.names[3], every.names[40]]
    np.testing.assert_array_equal(one.load(1, 28), every.load(40, 28))


def test_every_variant_is_a_training_of_its_own_that_differs_from_its_base(recipes):
    known, defaults = recipes.variants(), TrainConfig()
    assert {"paper", "fast"} < known.keys()
    made = {name: TrainConfig.from_dict(settings) for name, settings in known.items()}
    fields = [f.name for f in dataclasses.fields(TrainConfig)]
    for name, settings in known.items():
        assert set(settings) <= set(fields) - recipes.FIXED, name
        base = {key: getattr(defaults, key) for key in fields}
        base |= recipes.FAST if " without " in name else {}
        assert name in ("paper", "fast") or any(base[key] != value for key, value in settings.items()), name
    assert len(set(map(str, made.values()))) == len(made)


@pytest.mark.parametrize("text", ["no colon", "name:", "x: wdth=3", "x: image_size=3", "x: base=slow flip=false"])
def test_a_variant_that_says_nothing_is_refused(recipes, text):
    with pytest.raises(SettingError, match="--add"):
        recipes.read_variant(text)


def run(bench, pictures: Path, out: Path, *words: str) -> list[dict]:
    bench.main(["--data", str(pictures), "--out", str(out), *TINY, *words])
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_killed_bench_goes_on_to_the_same_scores(bench, pictures, tmp_path, monkeypatch, capsys):
    whole = run(bench, pictures, tmp_path / "whole")
    printed = capsys.readouterr().out
    assert (tmp_path / "whole" / "table.md").read_text() in printed
    assert "| paper |" in printed
    assert "| quick" in printed
    assert {(row["variant"], row["at"]) for row in whole} == {
        ("floor", 1.0), *((name, at) for name in ("paper", "quick") for at in (0.5, 1.0, "seconds"))
    }  # fmt: skip
    for name in ("curves.png", "samples/paper-0.png", "samples/quick-0.png"):
        assert (tmp_path / "whole" / name).stat().st_size > 100

    class Killed(Exception):
        pass

    take, left = bench.Steps.take, 60

    def take_some(self):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return take(self)

    monkeypatch.setattr(bench.Steps, "take", take_some)
    with pytest.raises(Killed):
        run(bench, pictures, tmp_path / "killed")
    lines = (tmp_path / "killed" / "results.jsonl").read_text()
    (tmp_path / "killed" / "results.jsonl").write_text(lines + '{"variant": "pap')
    monkeypatch.setattr(bench.Steps, "take", take)
    again = run(bench, pictures, tmp_path / "killed")
    assert len(again) == len(whole)
    scores = [
        {
            (row["variant"], row["at"]): (row.get("images"), row["fd"], row["kid"])
            for row in rows
            if row["at"] != "seconds"
        }
        for rows in (whole, again)
    ]
    assert scores[0] == scores[1]

    # Nothing is left to do, and nothing is done twice.
    monkeypatch.setattr(bench.Steps, "take", lambda self: pytest.fail("trained again"))
    assert run(bench, pictures, tmp_path / "killed") == again
    for words in (["--samples", "20"], ["--add", "quick: schedule=flow"]):
        with pytest.raises(SettingError, match="give another --out"):
            run(bench, pictures, tmp_path / "killed", *words)


def test_a_budget_that_scoring_alone_fills_is_refused(bench, pictures, tmp_path, capsys):
    with pytest.raises(SettingError, match="left to train 2 runs: give more"):
        run(bench, pictures, tmp_path, "--budget-seconds", "0.01")
    assert "scores of 40 samples" in capsys.readouterr().err
    assert not (tmp_path / "settings.json").exists()


def test_a_budget_of_seconds_becomes_one_of_images(bench, pictures, tmp_path, monkeypatch):
    """By a clock of 1 s a step, 100 s of a fast recipe or of a slow one are as many images of both."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(ticks)))
    args, recipes = bench.read_arguments(["--data", str(pictures), "--out", str(tmp_path), *TINY], "")
    images = bench.estimate(bench.Bench(args, recipes), 500.0, 0.0)
    assert 500 - 60 < images / 256 + images / 20 < 500  # the rest is for opening and scoring


def test_equal_seconds_are_those_of_paper(bench, pictures, tmp_path, monkeypatch):
    """By a clock of 1 s a step each recipe is scored at its first step after paper's last."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(ticks)))
    more = ["--add", "slow: batch_size=100", "--add", "same: batch_size=258 schedule=flow"]
    rows = {(row["variant"], row["at"]): row for row in run(bench, pictures, tmp_path, *more)}
    assert rows["paper", 1.0]["seconds"] == 8  # 2,000 images in batches of 256
    assert (rows["slow", "seconds"]["seconds"], rows["slow", "seconds"]["images"]) == (8, 800)
    assert (rows["slow", 1.0]["seconds"], rows["slow", 1.0]["images"]) == (20, 2000)
    assert rows["same", "seconds"]["shared"]
    assert not rows["slow", "seconds"].get("shared")


def test_the_held_out_pictures_are_not_trained_on(bench, pictures, tmp_path, monkeypatch):
    opened = []
    make = bench.make_batches
    monkeypatch.setattr(bench, "make_batches", lambda *args: opened.append(make(*args)) or opened[-1])
    run(bench, pictures, tmp_path, "--images", "200", "--curve", "1")
    training, held_out = split_off(open_dataset(str(pictures)), 0.25)
    seen = {tuple(moments.flatten().tolist()) for moments in opened[0].resident}

    def is_seen(image: np.ndarray) -> bool:
        sides = image, image[:, ::-1]
        return any(tuple(side.transpose(2, 0, 1).flatten().tolist()) in seen for side in sides)

    assert all(is_seen(training.load(k, 16)) for k in range(len(training)))
    assert not any(is_seen(held_out.load(k, 16)) for k in range(len(held_out)))
