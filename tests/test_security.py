"""What strangers made is refused or contained: pictures, archives, pickles, configs, links, a Hub that changes."""

from __future__ import annotations

import ast
import io
import json
import pickle
import struct
import subprocess
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from console import ditcli
from exports import PIXELS, TINY, make_latent_run, make_run
from hub_server import serve
from PIL import Image
from safetensors.torch import save_file
from test_hub import call
from test_hub import environment as hub_environment

import ditcli as package
from ditcli.codecs.folder import open_codec, read_autoencoder
from ditcli.data.folders import open_dataset
from ditcli.data.latents import open_latents
from ditcli.errors import DataError, DitcliError, SettingError, UnreadableImageError
from ditcli.evaluation.sides import ZipSide
from ditcli.models.lpips import load_lpips
from ditcli.runs import FORMAT, RunDir, read_model_config

environment = hub_environment
LIMIT = 5.0  # seconds that a refusal may take on a busy machine


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def server():
    with serve() as hub:
        yield hub


def png(width: int, height: int, rows: bytes) -> bytes:
    """A PNG that claims a size, with right checksums."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_picture_that_is_a_bomb_is_left_out_and_named(capfd, tmp_path, monkeypatch) -> None:
    """20 MB of zeros deflate to 20 KB; the header claims 10 GB."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DITCLI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "bomb.png").write_bytes(png(60_000, 60_000, bytes(20_000_000)))
    began = time.monotonic()
    with pytest.raises(UnreadableImageError, match="too large"):
        open_dataset("pictures").load(1, 16)
    assert time.monotonic() - began < LIMIT
    make_latent_run(tmp_path, TINY)
    words = [
        "encode",
        "--data",
        "pictures",
        "--vae",
        "vae",
        "--image-size",
        "16",
        "--device",
        "cpu",
        "--out",
        "latents",
    ]
    done = ditcli(capfd, *words)
    assert done.code == 0, done.err
    assert "bomb.png: too large" in done.err
    assert json.loads((tmp_path / "latents" / "names.json").read_text()) == ["a.png"]


def test_names_in_archives_never_become_paths(tmp_path) -> None:
    picture = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).save(picture, "PNG")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("../../evil.png", "/abs.png", "ok.png"):
            archive.writestr(name, picture.getvalue())
    before = sorted(tmp_path.parent.rglob("*"))
    pictures = list(ZipSide("x.zip", tmp_path / "x.zip").read(range(3), 4, 1))
    assert len(pictures) == 3
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["../elsewhere.npy", "/etc/moments.npy"])
def test_a_manifest_does_not_lead_out_of_its_folder(tmp_path, name) -> None:
    latents = tmp_path / "latents"
    latents.mkdir()
    np.save(tmp_path / "elsewhere.npy", np.zeros((1, 1, 4, 2, 2), np.float16))
    manifest = {"num": 1, "shape": [1, 4, 2, 2], "dtype": "float16", "per_image": False, "files": [name]}
    manifest |= {"class_names": [], "vae": "x", "image_size": 8}
    (latents / "manifest.json").write_text(json.dumps(manifest))
    (latents / "names.json").write_text('["a"]')
    dataset = open_latents(latents)
    assert dataset is not None
    with pytest.raises(DataError, match="leads out of the folder"):
        dataset.moments()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 5])
def test_no_pickle_runs_code_wherever_weights_are_read(tmp_path, protocol) -> None:
    """Models, VAEs and LPIPS: each names a file that reading it would make."""
    mine = tmp_path / "made-by-the-pickle"
    bomb = pickle.dumps({"x": Bomb(mine)}, protocol=protocol)
    (tmp_path / "model.pt").write_bytes(bomb)
    make_latent_run(tmp_path, TINY)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "vae" / "diffusion_pytorch_model.bin").write_bytes(bomb)
    (tmp_path / "lpips").mkdir()
    for name in ("squeezenet1_1-b8a52dc0.pth", "squeeze.pth"):
        (tmp_path / "lpips" / name).write_bytes(bomb)
    from ditcli.models.weights import load_dit

    for read, path in ((load_dit, "model.pt"), (open_codec, "vae"), (load_lpips, "lpips")):
        with pytest.raises(DitcliError):
            read(tmp_path / path)
    assert not mine.exists()


def test_nothing_of_ours_unpickles_or_evaluates() -> None:
    """`torch.load` with weights_only alone; no pickle.load, eval, exec, extractall, shell, nor arrays of objects."""
    for path in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system"), (path, called)
            assert not called.endswith(("extractall", ".extract")), (path, called)
            assert given.get("shell") in (None, "False"), (path, called)
            assert given.get("allow_pickle") in (None, "False"), (path, called)
            if called == "torch.load":
                assert given.get("weights_only") == "True", path


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("dit", "depth", 10**9),
        ("dit", "width", 4 * 10**9),
        ("dit", "input_size", [10**9, 10**9]),
        ("dit", "num_classes", 10**12),
        ("dit", "mlp_ratio", 1e300),
        ("diffusion", "num_timesteps", 10**12),
        (None, "image_size", 10**9),
    ],
)
def test_a_checkpoint_with_huge_numbers_is_refused_at_once(capfd, tmp_path, part, name, value) -> None:
    """Before a network of that size is built: the file is small, whatever its config claims."""
    values = PIXELS.to_dict()
    (values[part] if part else values)[name] = value
    path = tmp_path / "huge.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"format": FORMAT, "config": json.dumps(values)})
    began = time.monotonic()
    for words in (["info", path], ["sample", "--model", path]):
        done = ditcli(capfd, *words)
        assert done.code == 1
        assert name.replace("_", "-") in done.err
    assert time.monotonic() - began < LIMIT


@pytest.mark.parametrize(("name", "value"), [("layers_per_block", 10**9), ("block_out_channels", [64] * 10**4)])
def test_a_vae_with_huge_numbers_is_refused_at_once(tmp_path, name, value) -> None:
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", name: value}))
    began = time.monotonic()
    with pytest.raises(DitcliError, match=name):
        read_autoencoder(tmp_path)
    assert time.monotonic() - began < LIMIT


def test_links_out_of_a_data_folder_are_not_followed(tmp_path) -> None:
    picture = tmp_path / "private.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(picture)
    data = tmp_path / "data"
    data.mkdir()
    (data / "own.png").write_bytes(picture.read_bytes())
    (data / "link.png").symlink_to(picture)
    dataset = open_dataset(str(data))
    assert dataset.names == ["own.png"]
    assert "link out of the folder" in dataset.summary()


def test_a_link_where_a_picture_goes_is_replaced_not_followed(capfd, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    (tmp_path / "precious").write_text("keep me")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "cat_seed0.png").symlink_to(tmp_path / "precious")
    done = ditcli(capfd, "sample", "--model", "run", "--labels", "cat", "--steps", "1", "--device", "cpu")
    assert done.code == 0, done.err
    assert (tmp_path / "precious").read_text() == "keep me"
    assert not (tmp_path / "samples" / "cat_seed0.png").is_symlink()


@pytest.mark.parametrize("where", ["metrics.csv", "samples/step-00000007.png"])
def test_push_publishes_no_file_from_outside_the_run(tmp_path, where) -> None:
    from ditcli.config import PushConfig
    from ditcli.sharing import push

    run = make_run(tmp_path / "run")
    secret = tmp_path / "secret"
    secret.write_text("do not publish")
    run.samples.mkdir(exist_ok=True)
    (run.path / where).symlink_to(secret)
    config = PushConfig(run=str(run.path), repo="me/x", license="mit", dry_run=True, out=str(tmp_path / "out"))
    with pytest.raises(SettingError, match="out of the run"):
        push(config)
    assert not (tmp_path / "out").exists()


TRAIN = """
train --data pictures --vae me/vae --image-size 16 --model DiT-S/4 --width 32 --depth 1 --num-heads 2 --batch-size 2
--sample-every 0 --device cpu --precision fp32 --out run
"""
SAMPLE = "sample --model run --steps 2 --device cpu"


def test_a_hub_repository_that_changes_changes_no_run(server, environment, tmp_path) -> None:
    """A run names the commit of its VAE: it goes on with that one and its samples stay the same."""
    make_latent_run(tmp_path / "first", TINY)
    commit = server.add_folder("me/vae", tmp_path / "first" / "vae")
    (tmp_path / "pictures").mkdir()
    for k in range(2):
        values = np.random.default_rng(k).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "pictures" / f"{k}.png")
    run_all(environment, tmp_path, f"{TRAIN} --steps 2", f"{SAMPLE} --out before")
    assert read_model_config(RunDir(tmp_path / "run").newest_checkpoint()).codec == f"me/vae@{commit}"

    weights = tmp_path / "first" / "vae" / "diffusion_pytorch_model.safetensors"
    codec = read_autoencoder(tmp_path / "first" / "vae")
    save_file({name: value * 0.5 for name, value in codec.state_dict().items()}, weights)
    server.repos["me/vae"].commit({weights.name: weights.read_bytes()})
    run_all(environment, tmp_path, "pull me/vae", f"{SAMPLE} --out after", f"{TRAIN} --steps 4")
    before, after = ((tmp_path / out / "seed0.png") for out in ("before", "after"))
    assert np.array_equal(np.asarray(Image.open(before)), np.asarray(Image.open(after)))
    went_on = read_model_config(RunDir(tmp_path / "run").newest_checkpoint())
    assert (went_on.step, went_on.codec) == (4, f"me/vae@{commit}")


def run_all(environment: dict[str, str], place: Path, *lines: str) -> None:
    """Command lines, one after the other in one process: the client reads its environment when it is imported."""
    code = "import shlex, sys\nfrom ditcli.cli.main import cli\n"
    code += "for line in sys.argv[1:]: cli.main(shlex.split(line), standalone_mode=False)"
    done: subprocess.CompletedProcess[str] = call(environment, "-c", code, *lines, cwd=place)
    assert done.returncode == 0, done.stderr
