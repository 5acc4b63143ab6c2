"""`ditcli ui`: the pictures of the page are those of the command line (test_browser.py clicks through it)."""

from __future__ import annotations

import importlib.util
import shlex

import numpy as np
import pytest
from console import ditcli
from exports import make_run
from PIL import Image

from ditcli.config import UiConfig
from ditcli.errors import SettingError
from ditcli.images import make_grid
from ditcli.page import FRAMES, Model, command_line, enlarge, form, open_for_page

CHOSEN = {"num": 2, "cfg": 3.0, "steps": 20, "sampler": "ddim", "seed": 5}


@pytest.fixture
def model(tmp_path, monkeypatch) -> Model:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    return open_for_page(UiConfig(model="run", device="cpu"))


def test_the_page_draws_what_its_command_line_draws(capfd, model, tmp_path) -> None:
    *forming, (last, step) = form(model, [1, 0], **CHOSEN)
    assert step == CHOSEN["steps"]
    line = command_line(model, [1, 0], **CHOSEN)
    assert line == "ditcli sample --model run --labels 'dög' cat --num 2 --cfg 3 --steps 20 --sampler ddim --seed 5"
    done = ditcli(capfd, *shlex.split(line)[1:])
    assert done.code == 0, done.err
    images = enlarge(np.stack([np.asarray(Image.open(path)) for path in done.out.splitlines()]))
    expected = make_grid([list(images[:2]), list(images[2:])], ["dög", "cat"])
    assert np.abs(last.astype(int) - expected.astype(int)).max() <= 1  # a rounding: the batch is another
    steps = [step for _, step in forming]
    assert 3 <= len(steps) <= FRAMES
    assert steps == sorted(set(steps))
    assert all(grid.shape == last.shape for grid, _ in forming)
    assert (forming[0][0] != last).any()


@pytest.mark.parametrize("sampler", ["heun", "lms", "dpm++2m", "unipc"])
def test_every_kind_of_sampler_forms(model, sampler) -> None:
    grids = list(form(model, [0], **CHOSEN | {"sampler": sampler, "num": 1, "steps": 4}))
    assert [step for _, step in grids] == [1, 2, 3, 4]


def test_a_page_that_is_left_stops_drawing(model) -> None:
    forming = form(model, [0], **CHOSEN | {"steps": 200})
    next(forming)
    forming.close()  # waits for the thread


def test_too_many_pictures_and_no_label_are_refused(model) -> None:
    for labels, changes, told in (([0, 1], {"num": 17}, "34 pictures"), ([], {}, "no label is chosen")):
        with pytest.raises(SettingError, match=told):
            next(form(model, labels, **CHOSEN | changes))


def test_without_gradio_it_says_how_to_get_it(capfd, tmp_path, monkeypatch) -> None:
    if importlib.util.find_spec("gradio"):
        pytest.skip("gradio is installed")
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    done = ditcli(capfd, "ui", "--model", "run")
    assert (done.code, done.out) == (1, "")
    assert "pip install 'ditcli[ui]'" in done.err
