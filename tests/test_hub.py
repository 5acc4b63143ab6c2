"""Names that lead to models: the real huggingface_hub client against a Hub on loopback.

The client reads its environment at import, so each call is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import TOKEN, Hub, serve
from PIL import Image
from safetensors.torch import load_file, save_file

from ditcli import hub as names
from ditcli.config import DiffusionConfig, DiTConfig, ModelConfig, PushConfig
from ditcli.errors import ModelNotFoundError, SettingError
from ditcli.hub import HubName, find_checkpoint, portable_name
from ditcli.models.dit import DiT
from ditcli.runs import FORMAT

TINY = DiTConfig(
    input_size=(8, 8), in_channels=3, out_channels=3, patch_size=4, width=16, depth=1, num_heads=2, num_classes=2
)
FIND = """
import sys
from ditcli import errors, hub
for name in sys.argv[1:]:
    try: print(hub.find_checkpoint(name))
    except errors.DitcliError as error: print("Error:", error)
"""
COMMAND_LINES = """
import shlex, sys
from ditcli.cli.main import cli
for line in sys.argv[1:]:
    cli.main(shlex.split(line), standalone_mode=False)
"""


def tiny_checkpoint(path: Path) -> Path:
    torch.manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = ModelConfig(
        dit=TINY, diffusion=DiffusionConfig(), codec="pixels", image_size=8, class_names=("cat", "dog"), step=7
    )
    save_file(DiT(TINY).state_dict(), path, {"format": FORMAT, "config": json.dumps(config.to_dict())})
    return path


@pytest.fixture
def server() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@pytest.fixture
def environment(server: Hub, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DITCLI_"))}
    ours = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    return kept | ours | {"OMP_NUM_THREADS": "1", "DITCLI_CACHE": str(tmp_path / "cache")}


def call(environment: dict[str, str], *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, cwd=cwd)


def ask(environment: dict[str, str], *asked: str) -> list[str]:
    """What `find_checkpoint` says to each name, in one process: a path, or the error that the user reads."""
    done = call(environment, "-c", FIND, *asked)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def find(environment: dict[str, str], *asked: str) -> list[Path]:
    answers = ask(environment, *asked)
    assert not [answer for answer in answers if answer.startswith("Error:")]
    return [Path(answer) for answer in answers]


def ditcli(environment: dict[str, str], *lines: str, cwd: Path) -> list[str]:
    """What command lines print, run one after the other in one process."""
    done = call(environment, "-c", COMMAND_LINES, *lines, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


# Names


def test_hub_names():
    assert HubName.parse("facebook/DiT-XL-2-256") == HubName("facebook/DiT-XL-2-256")
    assert HubName.parse("a/b@v1.0") == HubName("a/b", "v1.0")
    assert HubName.parse("a/b:sub/folder") == HubName("a/b", None, "sub/folder")
    assert str(HubName.parse("a/b@main:x.pt")) == "a/b@main:x.pt"
    for name in ("a", "a/b/c", "/a/b", "./a", "../a", "a/b@", "a/b:", "~/a"):
        assert HubName.parse(name) is None


def test_local_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = tiny_checkpoint(tmp_path / "shared" / "model.safetensors")
    for name in ("shared", "shared/model.safetensors", str(checkpoint)):
        assert find_checkpoint(name).resolve() == checkpoint
    for name in ("one.pt", "two.pt"):
        (tmp_path / "many").mkdir(exist_ok=True)
        (tmp_path / "many" / name).touch()
    with pytest.raises(ModelNotFoundError, match=r"several models \(one.pt, two.pt\)"):
        find_checkpoint("many")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.txt").touch()
    with pytest.raises(ModelNotFoundError, match=r"holds no model.*model_index.json.*It holds notes.txt"):
        find_checkpoint("none")
    for name in ("nothing", "runs/nothing", "a/b/c"):
        with pytest.raises(ModelNotFoundError, match="owner/name@revision"):
            find_checkpoint(name)


def test_portable_names(tmp_path):
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / ("0" * 40)
    assert portable_name(snapshot) == f"a/b@{'0' * 40}"
    assert portable_name(snapshot / "vae") == f"a/b@{'0' * 40}:vae"
    assert portable_name(tmp_path / "x.pt") == str(tmp_path / "x.pt")


def test_what_is_needed_of_a_repository():
    pipeline = {"model_index.json", "transformer/config.json", "scheduler/scheduler_config.json", "vae/config.json"}
    weights = {
        f"{part}/diffusion_pytorch_model.{kind}" for part in ("transformer", "vae") for kind in ("bin", "safetensors")
    }
    chosen = names.choose_model(pipeline | weights | {"README.md", "samples.png"}, "x")
    assert set(chosen) == pipeline | {name for name in weights if name.endswith("safetensors")}
    with pytest.raises(ModelNotFoundError, match="has no transformer/diffusion_pytorch_model"):
        names.choose_model(pipeline, "x")
    assert names.choose_codec(
        {"config.json", "model.safetensors", "vae/config.json", "vae/model.safetensors"}, "x"
    ) == [
        "vae/config.json",
        "vae/model.safetensors",
    ]


# The Hub


def test_a_repository_is_fetched_once_and_then_works_offline(server, environment, tmp_path):
    content = tiny_checkpoint(tmp_path / "m.safetensors").read_bytes()
    old = server.add("me/tiny", {"model.safetensors": content, "README.md": b"old", "big.bin": b"0" * 1000})
    new = server.repos["me/tiny"].commit({"README.md": b"new"})
    first, again, by_commit = find(environment, "me/tiny", "me/tiny", f"me/tiny@{old}")
    assert first == again
    assert first.read_bytes() == content
    assert portable_name(first) == f"me/tiny@{new}:model.safetensors"
    assert portable_name(by_commit) == f"me/tiny@{old}:model.safetensors"
    assert len(server.downloads()) == 1  # neither the card nor the other weights, and the same bytes once
    server.log.clear()
    assert find(environment | {"HF_HUB_OFFLINE": "1"}, "me/tiny", f"me/tiny@{new}") == [first, first]
    assert server.log == []
    assert find(environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}, "me/tiny") == [first]  # no network at all


def test_a_subfolder_or_a_file_of_a_repository(server, environment, tmp_path):
    content = tiny_checkpoint(tmp_path / "m.safetensors").read_bytes()
    server.add("me/many", {"a/model.safetensors": content, "b/model.safetensors": b"b", "c.pt": b"c", "d.pt": b"d"})
    folder, file = find(environment, "me/many:a", "me/many:c.pt")
    assert folder.read_bytes() == content
    assert file.read_bytes() == b"c"
    assert len(server.downloads()) == 2
    several, nothing = ask(environment, "me/many", "me/many:e")
    assert "several models (c.pt, d.pt)" in several
    assert "me/many has no 'e'; it holds a/model.safetensors" in nothing


def test_each_failure_has_its_own_sentence(server, environment):
    server.add("me/gated", {"model.safetensors": b"x"}, gated=True)
    server.add("me/hidden", {"model.safetensors": b"x"}, private=True)
    server.add("me/text", {"README.md": b"x", "data.csv": b"y"})
    gated, missing, hidden, revision, wrong = ask(
        environment, "me/gated", "me/none", "me/hidden", "me/gated@v9", "me/text"
    )
    assert "gated: accept its terms on its page, then `hf auth login`" in gated
    assert "no file, folder, run or Hub repository 'me/none'" in missing
    assert "`hf auth login` where it is private" in hidden
    assert "has no revision 'v9'" in revision
    assert "holds no model" in wrong
    assert "It holds README.md, data.csv" in wrong
    (unreachable,) = ask(environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}, "me/text")
    assert "the Hub cannot be reached: connect to the network and run `ditcli pull me/text`" in unreachable
    (offline,) = ask(environment | {"HF_HUB_OFFLINE": "1"}, "me/text")
    assert "HF_HUB_OFFLINE=1 is set" in offline


def test_a_cut_connection_resumes_where_it_broke(server, environment):
    chunk = 10 * 2**20  # the client keeps what it has of a file in pieces of this size
    content = np.random.default_rng(0).bytes(2 * chunk)
    server.add("me/cut", {"model.safetensors": content})
    server.cut["model.safetensors"] = chunk + 2**20
    (path,) = find(environment, "me/cut")
    assert path.read_bytes() == content
    assert [line.partition("bytes=")[2] for line in server.downloads()] == ["", f"{chunk}-"]


def test_a_file_of_another_hash_is_refused_and_not_kept(server, environment):
    files = {"model.safetensors": b"m" * 5000, "vae/config.json": b"{} ", "vae/model.safetensors": b"v" * 99}
    server.add("me/large", files)
    server.add("me/small", files | {"model.safetensors": b"n" * 5000})
    server.corrupt |= {"model.safetensors"}
    (large,) = ask(environment, "me/large")
    server.corrupt = {"vae/config.json"}
    (small,) = ask(environment, "me/small")
    for answer, name in ((large, "model.safetensors of me/large"), (small, "config.json of me/small")):
        assert f"{name} arrived damaged: its hash is not the one that the Hub names" in answer
    server.corrupt.clear()
    again = find(environment, "me/large", "me/small")
    assert [path.read_bytes() for path in again] == [b"m" * 5000, b"n" * 5000]
    again[0].resolve().unlink()
    again[0].unlink()
    (half,) = ask(environment | {"HF_HUB_OFFLINE": "1"}, "me/large")
    assert "not in the cache, or not all of it" in half


# Pushing


def test_pushed_and_pulled_back_bit_for_bit(server, environment, tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "model" / "x.safetensors")
    line = f"push {checkpoint} me/mine --license mit --private"
    refused = call(environment, "-m", "ditcli", *line.split())
    assert refused.returncode == 1
    assert "does not let you write to me/mine: `hf auth login`" in refused.stderr
    page, path = ditcli(environment | {"HF_TOKEN": TOKEN}, line, "pull me/mine", cwd=tmp_path)
    assert page == f"{server.url}/me/mine"
    assert Path(path).read_bytes() == checkpoint.read_bytes()
    assert server.repos["me/mine"].private
    files = list(server.repos["me/mine"].commits.values())[-1]
    assert files["model.safetensors"] == checkpoint.read_bytes()
    assert files["samples.png"].startswith(b"\x89PNG")
    card = files["README.md"].decode()
    assert card.startswith("---\nlicense: mit\nlibrary_name: ditcli\n")
    assert 'ditcli sample --model me/mine --labels "cat"' in card
    assert str(tmp_path) not in card + files["config.json"].decode()
    assert "`hf auth login` where it is private" in ask(environment, "me/mine")[0]
    facts = json.loads("".join(ditcli(environment | {"HF_HUB_OFFLINE": "1"}, "info me/mine --json", cwd=tmp_path)))
    assert facts["steps"] == 7
    assert facts["classes"] == ["cat", "dog"]


def test_a_dry_run_writes_the_folder_that_is_a_model(tmp_path, monkeypatch):
    from ditcli.sharing import push

    monkeypatch.chdir(tmp_path)
    checkpoint = tiny_checkpoint(tmp_path / "x.safetensors")
    config = PushConfig(run=str(checkpoint), repo="me/mine", license="mit", dry_run=True)
    assert push(config) == "mine"
    assert {path.name for path in Path("mine").iterdir()} == {
        "model.safetensors",
        "config.json",
        "README.md",
        "samples.png",
    }
    assert find_checkpoint("mine").read_bytes() == checkpoint.read_bytes()
    with pytest.raises(SettingError, match="mine is there already"):
        push(config)
    with pytest.raises(SettingError, match=r"merge is on, but .* is no adapter"):
        push(replace(config, repo="me/other", merge=True))
    assert not Path("other").exists()
    for changes, message in (
        ({"license": None}, "license is None"),
        ({"repo": "mine"}, "repo is 'mine', but must be owner/name"),
    ):
        with pytest.raises(SettingError, match=message):
            replace(config, **changes)


def test_models_of_others_are_not_shared(shared):
    from ditcli.sharing import push

    folder = str(shared / "golden" / "diffusers_pipeline")
    with pytest.raises(SettingError, match="a model of others"):
        push(PushConfig(run=folder, repo="me/mine", license="mit", dry_run=True))


# The golden pipeline from the Hub, through the command line


def test_the_golden_pipeline_samples_fine_tunes_and_comes_back(server, environment, shared, tmp_path):
    golden = shared / "golden" / "diffusers_pipeline"
    server.add_folder("facebook/tiny-dit", golden)
    expected = load_file(shared / "golden" / "diffusers_pipeline_expected.safetensors")
    script = GOLDEN_NOISE.format(noise=str(shared / "golden" / "diffusers_pipeline_expected.safetensors"))
    words = "sample --model facebook/tiny-dit --cfg 4 --sampler ddim --steps 10 --device cpu --out s".split()
    done = call(environment, "-c", script, *words, "--labels", "golden retriever", "otter", "tinca tinca", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for i, path in enumerate(done.stdout.splitlines()):
        picture = torch.from_numpy(np.array(Image.open(tmp_path / path))).permute(2, 0, 1).float()
        wanted = (expected["out.image_0_1"][i] * 255).round()
        assert (picture - wanted).abs().max() <= 1  # a value at the edge of rounding
        assert (picture != wanted).float().mean() < 0.01

    rng = np.random.default_rng(0)
    for name in ("red", "blue"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "data" / name / f"{i}.png")
    tune = "train --from facebook/tiny-dit --data data --steps=2 --batch-size=4 --sample-every=0 --device cpu"
    run, _, _ = ditcli(
        environment | {"HF_TOKEN": TOKEN},
        f"{tune} --lora-rank 2",
        "push runs/data-from-tiny-dit me/tuned --license mit",
        "pull me/tuned",
        cwd=tmp_path,
    )
    assert run == "runs/data-from-tiny-dit"
    named = ("--model runs/data-from-tiny-dit", "--model me/tuned", "--model facebook/tiny-dit --adapter me/tuned")
    lines = (f"sample {name} --labels red --steps 2 --out out{i}" for i, name in enumerate(named))
    paths = ditcli(environment | {"HF_HUB_OFFLINE": "1"}, *lines, cwd=tmp_path)
    first, *others = (np.array(Image.open(tmp_path / path)) for path in paths)
    assert [(first == other).all() for other in others] == [True, True]


# `ditcli` as it is, but its generators' first draws are the recorded noise.
GOLDEN_NOISE = """
import itertools, numpy as np
from safetensors.numpy import load_file
recorded = iter(load_file({noise!r})["in.latents"])
class Recorded:
    def standard_normal(self, shape, dtype): return next(recorded)
np.random.default_rng = lambda seed: Recorded()
from ditcli.cli.main import run
run()
"""
