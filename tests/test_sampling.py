"""`sample` as a whole: files that can be resumed, pictures that start elsewhere than in noise, walks, trajectories."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from ditcli.codecs.folder import open_codec
from ditcli.config import DiTConfig, SampleConfig, SamplerName, TrainConfig
from ditcli.denoisers.forecast import cache_blocks
from ditcli.denoisers.torch_denoiser import open_denoiser
from ditcli.diffusion import samplers
from ditcli.diffusion.guidance import guide
from ditcli.errors import ResumeError, UnreadableImageError
from ditcli.images import load_square, read_png_metadata
from ditcli.memory import bytes_per_image, fitting_batch, free_memory
from ditcli.runs import RunDir
from ditcli.sampling import Samples, sample
from ditcli.starts import Start, read_photo, slerp
from ditcli.training.train import train

TINY = {
    "data": "fashion-mnist",
    "pixels": True,
    "image_size": 28,
    "model": "DiT-S/4",
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "batch_size": 16,
    "steps": 6,
    "lr": 1e-2,
    "ema_decay": 0.5,
    "checkpoint_every": 3,
    "sample_every": 0,
    "precision": "fp32",
    "device": "cpu",
    "schedule": "flow",
}


def train_tiny(folder: Path, **changes) -> RunDir:
    os.environ["DITCLI_CACHE"] = str(folder / "cache")
    try:
        return train(TrainConfig.from_dict(TINY | {"out": str(folder / "run")} | changes))
    finally:
        del os.environ["DITCLI_CACHE"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDir:
    return train_tiny(tmp_path_factory.mktemp("flow"))


@pytest.fixture(scope="module")
def discrete_run(tmp_path_factory) -> RunDir:
    return train_tiny(tmp_path_factory.mktemp("linear"), schedule="linear")


def grey_pictures(folder: Path) -> str:
    (folder / "pictures").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(np.full((28, 28, 3), 60 * i, dtype=np.uint8)).save(folder / "pictures" / f"{i}.png")
    return str(folder / "pictures")


@pytest.fixture(scope="module")
def unlabelled_run(tmp_path_factory) -> RunDir:
    folder = tmp_path_factory.mktemp("unlabelled")
    return train_tiny(folder, data=grey_pictures(folder))


def draw(run: RunDir, folder: Path, **settings) -> Samples:
    settings = {"steps": 3, "labels": ("bag",), "device": "cpu"} | settings
    return sample(SampleConfig.from_dict({"model": str(run.path), "out": str(folder)} | settings))


def pixels(samples: Samples) -> np.ndarray:
    return np.stack([np.asarray(Image.open(image.path)).astype(int) for image in samples.images])


# Batches


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_no_picture_depends_on_its_batch(run, tmp_path, name):
    drawn = [pixels(draw(run, tmp_path / str(n), sampler=name, num=5, batch_size=n)) for n in (1, 2, 5)]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1  # a rounding to uint8
    assert np.abs(drawn[0] - drawn[2]).max() <= 1
    assert np.abs(drawn[0][0] - drawn[0][1]).max() > 1


def test_a_batch_that_is_found_by_itself_fits_into_free_memory(run, tmp_path):
    assert (
        np.abs(pixels(draw(run, tmp_path / "a", num=3)) - pixels(draw(run, tmp_path / "b", num=3, batch_size=1))).max()
        <= 1
    )

    class Denoiser:
        from_numpy = staticmethod(torch.from_numpy)

    for side in (8, 32, 512, 4096):
        dit = DiTConfig(input_size=(side, side))
        found = fitting_batch(Denoiser(), dit, passes=2)
        assert 1 <= found <= 16
        assert found == 1 or found * 2 * bytes_per_image(dit) < free_memory("cpu")
    assert found == 1  # 17 million tokens


def test_an_image_needs_no_more_memory_than_is_foreseen():
    code = """
import torch
from pathlib import Path
from ditcli.config import DiTConfig
from ditcli.memory import bytes_per_image
from ditcli.models.dit import DiT
torch.set_num_threads(1)
config = DiTConfig(depth=2, width=384, num_heads=6, num_classes=2)
model = DiT(config).eval()

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

@torch.inference_mode()
def run(num):
    model(torch.randn(num, 4, 32, 32), torch.zeros(num), torch.zeros(num, dtype=torch.long))
    return peak()

few, many = run(1), run(17)
print((many - few) / 16 / bytes_per_image(config))
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.2 < float(done.stdout) < 1


@pytest.mark.parametrize(
    ("compiler", "told"),
    [
        pytest.param("no-compiler", "torch.compile does not work here", id="without a compiler"),
        pytest.param("g++", "", id="with one", marks=[pytest.mark.slow]),
    ],
)
def test_compiled_blocks_draw_the_same_pictures_and_none_are_needed(run, tmp_path, compiler, told):
    if told == "" and not shutil.which(compiler):
        pytest.skip("needs a C++ compiler")
    command = [sys.executable, "-m", "ditcli", "sample", "--model", str(run.path), "--labels", "bag", "--num", "3"]
    command += [
        "--steps",
        "3",
        "--compile",
        "--device",
        "cpu",
        "--batch-size",
        "2",
        "--out",
        str(tmp_path / "compiled"),
    ]
    environment = os.environ | {"CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=True)
    assert ("does not work" in process.stderr) == bool(told)
    assert told in process.stderr
    expected = draw(run, tmp_path / "eager", num=3)
    found = [np.asarray(Image.open(path)).astype(int) for path in sorted((tmp_path / "compiled").glob("*.png"))]
    assert np.abs(np.stack(found) - pixels(expected)).max() <= 1


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.29, 0.71)])
def test_cached_blocks_run_as_often_as_they_say_and_foresee_what_changes_smoothly(run, interval):
    denoiser, _ = open_denoiser(run.newest_checkpoint(), device=torch.device("cpu"))
    plain, _ = open_denoiser(run.newest_checkpoint(), device=torch.device("cpu"))
    cached, calls = cache_blocks(denoiser, 3), []
    denoiser.module.blocks[0].blocks[0].register_forward_hook(lambda *_: calls.append(1))
    labels, times = torch.tensor([8, 7]), samplers.time_grid(plain.diffusion.schedule, 50)
    for seed in (0, 1):  # the second trajectory knows nothing of the first
        calls.clear()
        x_t = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
        found, expected = (
            samplers.ddim(guide(d, 2.0, interval=interval), x_t, labels, times, noise=None) for d in (cached, plain)
        )
        assert len(calls) == (3 + 47 // 3 if interval == (0.0, 1.0) else (3 + 12 // 3) + (3 + 18 // 3) + (3 + 11 // 3))
        scale = (expected - x_t).abs().mean()
        assert 0 < (found - expected).abs().mean() < 0.02 * scale


# Files


def test_a_folder_is_resumed_and_other_settings_draw_anew(run, tmp_path):
    first = draw(run, tmp_path, num=2)
    written = [os.stat(image.path).st_mtime_ns for image in first.images]
    more = draw(run, tmp_path, num=4)
    assert [os.stat(image.path).st_mtime_ns for image in more.images[:2]] == written
    assert [image.seed for image in more.images] == [0, 1, 2, 3]
    Path(more.images[3].path).write_bytes(Path(more.images[3].path).read_bytes()[:-40])  # half a picture is none
    again = draw(run, tmp_path, num=4, grid=True)
    assert pixels(again).shape == (4, 28, 28, 3)
    assert Path(again.grid).is_file()
    other = draw(run, tmp_path, num=2, steps=4)
    assert all(os.stat(image.path).st_mtime_ns > time_ for image, time_ in zip(other.images, written, strict=True))


def test_a_new_model_of_the_same_name_draws_new_pictures(run, tmp_path):
    old = draw(run, tmp_path).images[0].path
    before = os.stat(old).st_mtime_ns
    checkpoint = run.newest_checkpoint()
    os.utime(checkpoint, ns=(0, checkpoint.stat().st_mtime_ns + 1))
    assert os.stat(draw(run, tmp_path).images[0].path).st_mtime_ns > before


def test_an_archive_has_the_layout_of_adms_suite(run, tmp_path):
    samples = draw(run, tmp_path / "all.npz", num=3, labels=("bag", "sneaker"))
    assert samples.archive == str(tmp_path / "all.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["all.npz"]
    with np.load(samples.archive) as archive:
        assert archive["arr_0"].shape == (6, 28, 28, 3)
        assert archive["arr_0"].dtype == np.uint8
        assert archive["arr_1"].tolist() == [8, 8, 8, 7, 7, 7]
        folder = draw(run, tmp_path / "folder", num=3, labels=("bag", "sneaker"))
        assert np.abs(archive["arr_0"].astype(int) - pixels(folder)).max() <= 1
    written = os.stat(samples.archive).st_mtime_ns
    draw(run, tmp_path / "all.npz", num=3, labels=("bag", "sneaker"))
    assert os.stat(samples.archive).st_mtime_ns == written
    with pytest.raises(ResumeError, match="steps: 3 there, 4 now"):
        draw(run, tmp_path / "all.npz", num=3, labels=("bag", "sneaker"), steps=4)
    (tmp_path / "mine.npz").write_bytes(b"something else")
    with pytest.raises(ResumeError, match="is not ditcli's"):
        draw(run, tmp_path / "mine.npz")
    assert (tmp_path / "mine.npz").read_bytes() == b"something else"


def test_an_archive_of_a_model_without_labels_has_none(unlabelled_run, tmp_path):
    samples = draw(unlabelled_run, tmp_path / "all.npz", num=2, labels=())
    with np.load(samples.archive) as archive:
        assert archive["arr_0"].shape == (2, 28, 28, 3)
        assert "arr_1" not in archive.files


@pytest.mark.parametrize("out", ["all.npz", "folder"])
def test_kill_9_at_any_moment_loses_at_most_a_batch(run, tmp_path, out):
    settings = {"num": 60, "steps": 20, "batch_size": 4, "cfg": 2.0, "labels": ("bag", "coat")}
    words = [sys.executable, "-m", "ditcli", "sample", "--model", str(run.path), "--out", str(tmp_path / out)]
    words += ["--num", "60", "--steps", "20", "--batch-size", "4", "--cfg", "2", "--labels", "bag", "coat"]

    def done() -> int:
        partial = tmp_path / ".all.npz.pixels"
        return partial.stat().st_size // 2352 if partial.exists() else len(list(tmp_path.glob("folder/*.png")))

    process = subprocess.Popen(
        [*words, "--device", "cpu"], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and done() < 5:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 5 <= done() < 120
    if out == "all.npz":
        with (tmp_path / ".all.npz.pixels").open("ab") as file:
            file.write(b"half a picture")
    else:
        kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("folder/*.png")}
    finished = draw(run, tmp_path / out, **settings)
    whole = draw(run, tmp_path / "whole", **settings)
    if out == "all.npz":
        with np.load(finished.archive) as archive:
            found = archive["arr_0"].astype(int)
    else:
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        found = pixels(finished)
    assert np.abs(found - pixels(whole)).max() <= 1


# Guidance


def test_autoguidance_by_the_model_itself_is_the_identity(run, tmp_path):
    plain = pixels(draw(run, tmp_path / "plain", num=2, cfg=1.0))
    itself = pixels(draw(run, tmp_path / "itself", num=2, cfg=3.0, guide_model=str(run.path)))
    np.testing.assert_array_equal(plain, itself)
    earlier = str(run.checkpoint_file(3))
    assert (pixels(draw(run, tmp_path / "earlier", num=2, cfg=3.0, guide_model=earlier)) != plain).any()


def test_a_model_without_labels_is_guided_by_another_model_alone(unlabelled_run, tmp_path):
    alone = draw(unlabelled_run, tmp_path / "alone", labels=())
    assert json.loads(read_png_metadata(alone.images[0].path)["ditcli"])["cfg"] == 1.0
    earlier = str(unlabelled_run.checkpoint_file(3))
    guided = draw(unlabelled_run, tmp_path / "guided", labels=(), guide_model=earlier)
    assert (pixels(guided) != pixels(alone)).any()


# Pictures that start elsewhere


@pytest.fixture
def photo(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (40, 28, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    mask = np.zeros((40, 28), dtype=np.uint8)
    mask[15:25, 5:18] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("name", ["ddim", "unipc", "heun"])
def test_strength_0_is_the_picture_and_more_is_further_from_it(run, discrete_run, tmp_path, photo, name):
    square = load_square(photo, 28).astype(int)
    for model in (run, discrete_run):
        out = tmp_path / model.path.parent.name
        common = {"init": str(photo), "sampler": name, "steps": 10}
        same = pixels(draw(model, out / "0", strength=0.0, **common))[0]
        np.testing.assert_array_equal(same, square)
        found = [pixels(draw(model, out / f"{s}", strength=s, **common))[0] for s in (0.1, 0.6, 1.0)]
        distances = [np.abs(image - square).mean() for image in found]
        assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("name", ["ddim", "ddpm", "unipc", "heun", "lms"])
def test_the_mask_keeps_every_pixel_that_is_not_white(run, discrete_run, tmp_path, photo, name):
    square = load_square(photo, 28).astype(int)
    paint = np.zeros((28, 28), dtype=bool)
    paint[9:19, 5:18] = True  # the centre of 40 rows begins with the sixth
    for model in (run, discrete_run):
        out = tmp_path / model.path.parent.name
        settings = {"init": str(photo), "mask": str(tmp_path / "mask.png"), "sampler": name, "steps": 6, "num": 2}
        for image in pixels(draw(model, out, **settings)):
            np.testing.assert_array_equal(image[~paint], square[~paint])
            assert (image[paint] != square[paint]).mean() > 0.5


def test_the_reconstruction_of_a_vae_and_its_mask(shared, tmp_path):
    """With real weights: strength 0 is what the VAE makes of a picture, to the bit."""
    vae, folder = shared / "weights" / "taesd", tmp_path / "model"
    changes = {"pixels": False, "vae": str(vae), "image_size": 64, "steps": 1, "batch_size": 4}
    model = train_tiny(folder, data=grey_pictures(folder), **changes)
    photo = next((shared / "data" / "celeba" / "img_align_celeba").glob("*.jpg"))
    square = load_square(photo, 64)
    codec = open_codec(vae)
    expected = codec.decode(codec.to_latents(codec.encode(torch.from_numpy(square).permute(2, 0, 1)[None])))
    found = pixels(draw(model, tmp_path / "0", init=str(photo), strength=0.0, labels=()))[0]
    np.testing.assert_array_equal(found, expected[0].permute(1, 2, 0).numpy())

    with Image.open(photo) as opened:
        mask = Image.new("L", opened.size)
    mask.paste(255, (80, 90, 120, 130))
    mask.save(tmp_path / "mask.png")
    painted = read_photo(str(photo), str(tmp_path / "mask.png"), 64).paint
    latent = read_photo(str(photo), str(tmp_path / "mask.png"), 64).latent_mask(8, 8)
    assert 0 < painted.mean() < 0.2
    assert (latent[0].repeat(8, axis=0).repeat(8, axis=1) >= painted).all()
    image = pixels(draw(model, tmp_path / "1", init=str(photo), mask=str(tmp_path / "mask.png"), labels=()))[0]
    np.testing.assert_array_equal(image[~painted], square[~painted])
    assert (image[painted] != square[painted]).any()


def test_a_mask_of_another_size_and_a_broken_photo_are_refused(run, tmp_path, photo):
    Image.new("L", (10, 10)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match="10x10 pixels, but must be as large as the picture, 28x40"):
        draw(run, tmp_path, init=str(photo), mask=str(tmp_path / "small.png"))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(UnreadableImageError, match=r"broken\.jpg"):
        draw(run, tmp_path, init=str(tmp_path / "broken.jpg"))


# Walks


def test_a_walk_between_seeds_begins_and_ends_with_their_pictures(run, tmp_path):
    ends = pixels(draw(run, tmp_path, num=6, seed=3))[[0, 5]]
    walk = draw(run, tmp_path, num=5, seed=3, to_seed=8, interpolate="seeds", grid=True)
    assert Path(walk.images[1].path).name == "bag_seed3-8_001.png"
    found = pixels(walk)
    assert np.abs(found[[0, -1]] - ends).max() <= 1
    assert np.abs(found[2] - ends[0]).max() > 1
    with Image.open(walk.animations[0]) as gif:
        assert gif.n_frames == 8  # there and back


def test_a_walk_between_labels_begins_and_ends_with_theirs(run, tmp_path):
    ends = pixels(draw(run, tmp_path, labels=("bag", "coat"), sampler="heun"))
    found = pixels(draw(run, tmp_path, labels=("bag", "coat"), sampler="heun", num=3, interpolate="labels"))
    assert np.abs(found[[0, -1]] - ends).max() <= 1
    assert np.abs(found[1] - (ends[0] + ends[1]) / 2).max() > 0.4 or (ends[0] == ends[1]).all()
    with pytest.raises(ValueError, match="needs two of them, but there are 1: name them with --labels"):
        draw(run, tmp_path, num=3, interpolate="labels")


def test_spherical_steps_keep_the_length_of_noise():
    first, second = np.random.default_rng(0).standard_normal((2, 4, 32, 32), dtype=np.float32)
    np.testing.assert_allclose(slerp(first, second, 0.0), first, atol=1e-6)
    np.testing.assert_allclose(slerp(first, second, 1.0), second, atol=1e-6)
    np.testing.assert_allclose(slerp(first, first, 0.3), first)
    lengths = [np.linalg.norm(slerp(first, second, share)) for share in np.linspace(0, 1, 9)]
    assert np.ptp(lengths) < abs(lengths[0] - lengths[-1]) * 1.5 + 1e-3
    assert slerp(first, second, 0.5).dtype == np.float32
    fresh = Start(1, 2, 0.5).normals()
    assert abs(fresh((10_000,)).std() - 1) < 0.05


# The way there


def test_a_trajectory_ends_with_the_picture(run, tmp_path):
    samples = draw(run, tmp_path, num=2, steps=5, trajectory=True)
    assert [Path(path).name for path in samples.animations[:2]] == ["bag_seed0_path.gif", "bag_seed0_path.png"]
    plain = pixels(draw(run, tmp_path / "plain", num=2, steps=5))
    np.testing.assert_array_equal(pixels(samples), plain)
    for image, gif, strip in zip(plain, samples.animations[::2], samples.animations[1::2], strict=True):
        with Image.open(gif) as frames:
            assert 2 <= frames.n_frames <= 5  # Pillow joins frames that are equal
        enlarged = image.repeat(3, axis=0).repeat(3, axis=1)
        end = np.asarray(Image.open(strip)).astype(int)[2:-2, -2 - enlarged.shape[1] : -2]
        np.testing.assert_array_equal(end, enlarged)
    long = draw(run, tmp_path / "long", steps=60, trajectory=True)
    with Image.open(long.animations[0]) as frames:
        assert frames.n_frames <= 24


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"eta": 1.0, "sampler": "unipc"}, "eta is 1.0, but must be 0 with --sampler unipc"),
        ({"order": 2}, "order is 2, but must be left out with --sampler ddim"),
        ({"order": 5, "sampler": "lms"}, "1 to 4"),
        ({"strength": 0.5}, "strength is 0.5, but must be given with --init only"),
        ({"mask": "mask.png"}, "mask is 'mask.png', but must be given with --init only"),
        ({"to_seed": 4}, "given with --interpolate seeds only"),
        ({"interpolate": "seeds"}, "num is 1, but must be at least 2 with --interpolate"),
        ({"out": "all.npz", "grid": True}, "need a folder"),
        ({"cfg_interval": (0.8, 0.2)}, "cfg-interval is"),
        ({"cfg_rescale": 1.5}, "from 0 to 1"),
        ({"batch_size": "many"}, "batch-size is 'many', but must be auto or at least 1"),
        ({"batch_size": 0}, "auto or at least 1"),
        ({"cache": 0}, "at least 1"),
        ({"cache": 2, "sampler": "heun"}, "cache is 2, but must be 1 with --sampler heun"),
        ({"shift": 0.0}, "positive"),
        ({"spacing": "karras"}, "boundless at t = 1"),
        ({"cfg_channels": 5}, "cfg-channels is 5, but the model has 3"),
    ],
)
def test_a_refused_setting_says_why(run, tmp_path, settings, sentence):
    with pytest.raises(ValueError) as error:
        draw(run, tmp_path / "never", **settings)
    assert sentence in str(error.value)
    assert not (tmp_path / "never").exists()
