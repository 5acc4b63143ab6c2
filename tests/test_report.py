"""A run's page: whole, self-contained, right about what it says, and never in training's way."""

from __future__ import annotations

import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from ditcli.cli import main
from ditcli.config import TrainConfig
from ditcli.data.folders import open_dataset
from ditcli.evaluation.pixel_features import PixelFeatures
from ditcli.images import cut_grid, fit_square, make_grid, read_image, write_png
from ditcli.reporting import charts
from ditcli.reporting.charts import Line, chart
from ditcli.reporting.nearest import open_pictures
from ditcli.reporting.pictures import spread
from ditcli.reporting.report import write_report
from ditcli.reporting.summary import read_summary
from ditcli.runs import RunDir
from ditcli.training.train import train

COLUMNS = "step,loss,smoothed,lr,grad_norm,images_per_second,seconds,memory_gb,loss_noise_1,loss_noise_8,score"


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory) -> None:
    os.environ["DITCLI_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["DITCLI_CACHE"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two classes of coloured gradients, each other than the rest."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(24):
        name = folder / ("left" if i % 2 else "right") / f"{i:02}.png"
        name.parent.mkdir(exist_ok=True)
        Image.fromarray(gradient(i)).save(name)
    return folder


def gradient(i: int, size: int = 24) -> np.ndarray:
    """uint8 (size, size, 3): brighter to one side, in a colour of its own."""
    rng = np.random.default_rng(i)
    ramp = np.linspace(0, 1, size)[None, :, None] * rng.uniform(0.3, 1, 3)
    return np.broadcast_to(ramp * 255, (size, size, 3)).astype(np.uint8)


def train_tiny(out: Path, data: Path, **changes) -> RunDir:
    settings = {"data": str(data), "pixels": True, "image_size": 24, "model": "DiT-S/4", "width": 32, "depth": 1}
    settings |= {"num_heads": 2, "batch_size": 8, "steps": 6, "log_every": 2, "checkpoint_every": 3, "sample_every": 3}
    settings |= {"sample_num": 2, "sample_steps": 2, "device": "cpu", "precision": "fp32", "out": str(out)}
    return train(TrainConfig.from_dict(settings | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures) -> RunDir:
    return train_tiny(tmp_path_factory.mktemp("runs") / "small", pictures)


def run_by_hand(
    folder: Path, *, rows: int = 0, classes: tuple[str, ...] = (), grids: tuple[int, ...] = (), sample_num: int = 4
) -> RunDir:
    """A run folder as training leaves it, of 100 steps."""
    run = RunDir(folder)
    run.checkpoints.mkdir(parents=True)
    run.samples.mkdir()
    train = TrainConfig(data="no-such-folder", steps=100, sample_every=20, sample_num=sample_num).to_dict()
    data = {"layout": "flat folder", "images": 10, "classes": list(classes)}
    about = {"train": train, "data": data, "model": {"image_size": 24}, "command": ["x", "train"], "device": "cpu"}
    run.config_file.write_text(json.dumps(about))
    lines = [f"{k},{1 / k},{1 / k},1e-4,1.0,50,{k},1.5,0.5,,\r\n" for k in range(1, rows + 1)]
    run.metrics_file.write_text(COLUMNS + "\r\n" + "".join(lines))
    for step in grids:
        images = [[gradient(step + k) for k in range(4)] for _ in classes or ("",)]
        write_png(run.samples / f"step-{step:08}.png", make_grid(images, classes))
    return run


class Page(HTMLParser):
    """Checks what it reads: all that is opened is closed in order, and nothing is fetched."""

    VOID = frozenset({"meta", "img", "input", "br", "link", "circle", "line", "polyline"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.pictures: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        for name in ("src", "href"):
            assert values.get(name, "data:").startswith("data:")
        if tag == "img":
            self.pictures.append(values["src"])
            assert values["alt"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def read_page(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import", text)
    return Page(text)


def test_training_leaves_a_page_that_shows_all_and_needs_nothing(trained):
    page = read_page(trained.report_file)
    for said in ("small", "Step 6 of 6", "done", "24 images", "2 classes", "Loss by noise level", "Gradient norm"):
        assert said in page.text
    assert f"ditcli sample --model {trained.path} --labels left right --cfg 4" in page.text
    assert "step 3" in page.text
    assert "nearest of 24 training images" in page.text
    assert len(page.pictures) == 1 + 2 + 4 * 5  # the first grid, all grids, and samples with their neighbours
    assert 'http-equiv="refresh"' not in trained.report_file.read_text()  # the run is done
    assert trained.loss_file.read_bytes().startswith(b"\x89PNG")
    with Image.open(trained.animation_file) as animation:
        assert animation.n_frames == 2
        with Image.open(trained.samples / "step-00000006.png") as grid:
            assert animation.size == (grid.width, grid.height + 26)


def test_a_page_that_fails_stops_no_run(tmp_path, pictures, capsys):
    (tmp_path / "run" / "report.html" / "in-the-way").mkdir(parents=True)
    (tmp_path / "run" / "loss.png" / "in-the-way").mkdir(parents=True)
    run = train_tiny(tmp_path / "run", pictures)
    assert run.saved_steps() == [3, 6]
    told = capsys.readouterr().err
    assert told.count("the report could not be written") == 1
    assert "training goes on" in told


def test_a_run_without_samples_rows_or_pictures_has_a_page(tmp_path):
    for name, rows in (("none", 0), ("one", 1), ("some", 7)):
        run = run_by_hand(tmp_path / name, rows=rows)
        page = read_page(write_report(read_summary(run), "the pictures are gone"))
        assert "None yet: the first grid comes at step 20" in page.text
        assert ("No numbers yet" in page.text) == (rows == 0)
        assert f"Step {rows} of 100" in page.text
        assert "the pictures are gone" in page.text
        assert page.tags.count("circle") == {0: 0, 1: 7, 7: 0}[rows]  # a single row is a point in each line
        assert 'http-equiv="refresh"' in run.report_file.read_text()  # it goes on


def test_names_of_any_kind_are_text(tmp_path):
    classes = ("<script>alert(1)</script>", "a & b", "x" * 200)
    run = run_by_hand(tmp_path / "a <b> run", rows=3, classes=classes, grids=(20, 40))
    page = read_page(write_report(read_summary(run), "<i>"))
    assert page.tags.count("script") == 1
    assert "a <b> run" in page.text
    for name in classes:
        assert name in page.text


def test_long_runs_embed_some_of_their_grids(tmp_path):
    run = run_by_hand(tmp_path / "run", rows=3, grids=tuple(range(1, 41)))
    page = read_page(write_report(read_summary(run)))
    assert len(page.pictures) == 1 + 12
    assert spread(range(1, 41), 3) == [1, 21, 40]
    assert spread([5], 3) == [5]


def test_report_is_made_anew_and_compares(tmp_path, pictures, trained, monkeypatch, capsys):
    other = train_tiny(tmp_path / "other", pictures, width=16, sample_every=0)

    def ditcli(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ditcli", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main.run()
        return (stop.value.code or 0, *capsys.readouterr())

    trained.report_file.unlink()
    code, out, err = ditcli("report", trained.path, "--features", "pixels", "--num-real", 10)
    assert (code, out.strip()) == (0, str(trained.report_file)), err
    assert "nearest of 10 training images" in read_page(trained.report_file).text
    code, out, err = ditcli("report", trained.path, other.path, "--out", tmp_path / "both.html")
    assert (code, out.strip()) == (0, str(tmp_path / "both.html")), err
    page = read_page(tmp_path / "both.html")
    assert "width" in page.text
    assert "batch-size" not in page.text  # they are equal in that
    assert "no samples yet" in page.text
    assert page.pictures
    code, _, err = ditcli("report", tmp_path / "nothing")
    assert code == 1
    assert "is no run" in err
    code, _, err = ditcli("report", trained.path, "--weights", "x")
    assert code == 2
    assert "left out without --features" in err


def test_runs_lists_and_shows(tmp_path, trained, monkeypatch, capsys):
    root = tmp_path / "runs"
    run_by_hand(root / "young", rows=2)
    old = run_by_hand(root / "old", rows=5)
    (root / "old" / "scores.csv").write_text("step,FID of 9 samples\r\n3,20.5\r\n5,10.25\r\n")
    (root / "no-run").mkdir()
    for file in (old.metrics_file, old.config_file):
        os.utime(file, (1e9, 1e9))

    def ditcli(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ditcli", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main.run()
        return (stop.value.code or 0, *capsys.readouterr())

    code, out, err = ditcli("runs", "--root", root)
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["run", "step", "loss", "score", "age"]
    assert [line[0] for line in lines[1:]] == ["young", "old"]  # the newest first
    assert lines[2][1:4] == ["5", "of", "100"]
    assert lines[2][5] == "10.25"
    assert lines[2][7] == "days"
    (young, older) = json.loads(ditcli("runs", "--root", root, "--json")[1])
    assert (young["step"], young["score"], older["score"], older["score_step"]) == (2, None, 10.25, 5)
    shown = ditcli("runs", "show", "old", "--root", root)[1]
    assert re.search(r"best score +10\.25 at step 5 \(FID of 9 samples\)", shown)
    known = json.loads(ditcli("runs", "show", trained.path, "--json")[1])
    assert (known["classes"], known["checkpoints"], known["command"]) == (["left", "right"], [3, 6], "train")
    code, _, err = ditcli("runs", "show", "yung", "--root", root)
    assert code == 1
    assert "Did you mean 'young'" in err
    (root / "old" / "config.json").write_text("{")
    code, out, err = ditcli("runs", "--root", root)
    assert (code, [line.split()[0] for line in out.splitlines()]) == (0, ["run", "young"])
    assert "config.json is damaged" in err
    code, _, err = ditcli("runs", "show", "old", "--root", root)
    assert code == 1
    assert "config.json is damaged" in err
    code, out, err = ditcli("runs", "--root", tmp_path / "empty")
    assert (code, out) == (0, "")
    assert "ditcli train" in err


# The nearest training pictures


def test_a_copy_is_found_at_distance_nought_whichever_way_it_looks(tmp_path, pictures):
    dataset = open_dataset(str(pictures))
    known = open_pictures(dataset, "pictures", PixelFeatures(), image_size=24, num=100)
    run = run_by_hand(tmp_path / "run", classes=("left", "right"), sample_num=2)
    images = [gradient(5), gradient(8)[:, ::-1]], [gradient(100), gradient(101)]
    write_png(run.samples / "step-00000020.png", make_grid(images, ("left", "right")))
    found = known.nearest(read_summary(run))
    assert (found.step, found.searched, found.features) == (20, 24, "pixels")
    assert [label for label, _, _ in found.samples] == ["left", "left", "right", "right"]
    nearest = [neighbours[0] for _, _, neighbours in found.samples]
    assert [neighbour.name for neighbour in nearest[:2]] == ["left/05.png", "right/08.png"]
    assert [neighbour.distance for neighbour in nearest[:2]] == pytest.approx([0, 0], abs=1e-6)
    assert min(neighbour.distance for neighbour in nearest[2:]) > 0.003
    np.testing.assert_array_equal(nearest[0].image, gradient(5))
    for _, _, neighbours in found.samples:
        assert [n.distance for n in neighbours] == sorted(n.distance for n in neighbours)

    features = known.features
    apart = np.sqrt(np.square(features[:, None] - features).sum(axis=2)) + np.diag(np.full(len(features), np.inf))
    assert known.usual == pytest.approx(np.median(apart.min(axis=1)), rel=1e-3)


def test_distances_of_pixels_are_root_mean_squares():
    a, b = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 51, np.uint8)
    one, other = PixelFeatures()(np.stack([a, b]))
    assert np.linalg.norm(one - other) == pytest.approx(0.2)
    many = PixelFeatures()([gradient(0), gradient(1, 40)])  # of several sizes
    assert many.shape == (2, 768)


def test_a_picture_that_cannot_be_read_shifts_no_name(tmp_path):
    for i in range(6):
        Image.fromarray(gradient(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"broken")
    known = open_pictures(open_dataset(str(tmp_path)), "pictures", PixelFeatures(), image_size=24, num=100)
    assert [known.dataset.names[i] for i in known.readable] == ["0.png", "1.png", "3.png", "4.png", "5.png"]
    assert len(known.features) == 5


@pytest.mark.parametrize(("size", "names"), [(28, ("a", "b")), (64, ()), (100, ("long " * 9, "b"))])
def test_a_grid_is_cut_into_what_it_was_made_of(size, names):
    rows = [[gradient(10 * i + j, size) for j in range(3)] for i in range(2)]
    for row, found in zip(rows, cut_grid(make_grid(rows, names), size, 3), strict=True):
        for image, other in zip(row, found, strict=True):
            np.testing.assert_array_equal(image, other)


# Charts

finite = st.floats(-1e12, 1e12, allow_nan=False)


@given(st.lists(st.tuples(finite, st.one_of(st.none(), st.floats())), max_size=30), st.booleans(), st.booleans())
@example([(0.0, 5e-324)], False, False)
@example([(0.0, 1.0), (5e-324, 2.0)], True, False)
def test_whatever_is_drawn_stays_inside(points, zero, settled):
    points = sorted(points, key=lambda point: point[0])
    drawn = chart("A", [Line("a", points), Line("b", points[:1])], zero=zero, settled=settled)
    for number in re.findall(r'(?:points|cx|x1)="([^"]*)"', drawn):
        for pair in number.split():
            x, *y = map(float, pair.split(","))
            assert charts.LEFT - 0.1 <= x <= charts.WIDTH - charts.RIGHT + 0.1
            assert all(charts.TOP - 0.1 <= value <= charts.HEIGHT - charts.BOTTOM + 0.1 for value in y)
    known = [y for _, y in points if y is not None and abs(y) < charts.LARGEST]
    assert bool(drawn) == bool(known)


def test_gaps_split_a_line_and_thinning_keeps_means():
    points = [(k, None if k == 5 else float(k)) for k in range(10)]
    assert chart("A", [Line("a", points)]).count("<polyline") == 2
    many = [(k, float(k % 7)) for k in range(7 * 900)]
    thin = charts._thin(many)
    assert len(thin) <= charts.MOST_POINTS
    assert np.mean([y for _, y in thin]) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("value", "said"), [(0.82, "0.82"), (1500, "1,500"), (25_000, "25k"), (2e-5, "2e-05"), (0.0, "0"), (3e6, "3M")]
)
def test_numbers_are_short(value, said):
    assert charts.number(value) == said


def test_the_page_of_faces(shared, tmp_path):
    """Neighbours of real faces in a network's features: a training picture as the sample finds itself."""
    celeba = shared / "data" / "celeba"
    network = shared / "weights" / "efficientnet_lite0_features.onnx"
    from ditcli.evaluation.features import OnnxFeatures

    dataset = open_dataset(str(celeba))
    known = open_pictures(dataset, "celeba", OnnxFeatures(network), image_size=64, num=48)
    index = known.readable[7]
    face = fit_square(read_image(dataset.folder / known.dataset.names[index]), 64)
    run = run_by_hand(tmp_path / "run")
    write_png(run.samples / "step-00000020.png", make_grid([[face] * 4]))
    about = json.loads(run.config_file.read_text())
    about["model"]["image_size"] = 64
    run.config_file.write_text(json.dumps(about))
    found = known.nearest(read_summary(run))
    assert found.samples[0][2][0].name == known.dataset.names[index]
    assert found.samples[0][2][0].distance < 0.05 * found.usual
