"""The README cannot rot: its commands are parsed, and run in their order on a folder that stands for the user's."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
import torch
from exports import TINY
from hub_server import Hub, serve
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from ditcli.cli.main import cli
from ditcli.codecs.autoencoder_tiny import AutoencoderTiny
from ditcli.codecs.folder import save_codec

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
# Words added to a command so that it takes a second: of options given twice the last one counts. A command that is not
# here is parsed only.
NETWORK = "--width 16 --depth 1 --num-heads 2"
BUDGET = {
    "train": "--steps 2 --batch-size 4 --warmup-steps 0 --sample-every 0 --device cpu",
    "sample": "--steps 2 --device cpu",
    "export-onnx": "",
    "fid": "--features efficientnet_lite0_features.onnx --device cpu",
    "train-vae": "--lpips none --steps 2 --batch-size 2 --widths 8 16 --image-size 32 --norm-groups 4 --gan-width 4 "
    "--holdout 2 --sample-every 0 --device cpu",
    "encode": "--device cpu",
    "decode": "--device cpu",
    "pull": "",
    "push": "--dry-run --out pushed",
    "info": "",
    "ema": "",
    "runs": "",
    "report": "",
}
RUN_LINES = """
import shlex, sys
from ditcli.cli.main import cli
for line in sys.argv[1:]:
    print("$ ditcli", line, file=sys.stderr, flush=True)
    cli.main(shlex.split(line), standalone_mode=False)
"""


def lines_of_code() -> list[str]:
    """Every command in an indented block, its continued lines joined."""
    blocks = re.findall(r"(?:^    .+\n)+", README, flags=re.MULTILINE)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


LINES = lines_of_code()
CONTEXT = click.Context(cli, info_name="ditcli", **cli.context_settings)
COMMANDS = [line.removeprefix("ditcli ") for line in LINES if line.startswith("ditcli ")]


def test_every_line_of_code_is_a_command_that_there_is():
    for line in LINES:
        program, *words = shlex.split(line)
        if program in ("bash", "python") and words[0] != "-m":
            assert (ROOT / words[0]).is_file(), line
        else:
            assert program in ("ditcli", "pip", "torchrun", "eval"), line
    assert len(COMMANDS) > 20


def test_every_script_has_the_options_that_are_given_to_it():
    """They take minutes, and are run when their tables are made."""
    for line in re.findall(r"python scripts/[^`\n]+", README.replace("\\\n", " ")):
        _, script, *words = shlex.split(line)
        source = (ROOT / script).read_text()
        beside = [(ROOT / script).with_name(f"{name}.py") for name in re.findall(r"^from (\w+) import", source, re.M)]
        source += "".join(path.read_text() for path in beside if path.is_file())
        for word in words:
            assert not word.startswith("--") or f'"{word}"' in source, f"{word} of {line}"


@pytest.mark.parametrize(
    "line", [*COMMANDS, *(line.partition("-- ditcli ")[2] for line in LINES if "torchrun" in line)]
)
def test_every_command_parses(line):
    name, *words = shlex.split(line)
    command = cli.get_command(CONTEXT, name)
    assert command is not None, f"there is no command {name}"
    command.make_context(name, words, parent=CONTEXT)


def test_what_is_named_in_passing_exists():
    """Options, presets and files between backticks."""
    known = {"--help"}
    for name in cli.list_commands(CONTEXT):
        command = cli.get_command(CONTEXT, name)
        assert command is not None
        known |= {word for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts)}
    prose = re.sub(r"`(?:pip|bash|python|torchrun)[^`]*`", "", README.replace("\n", " "))
    for code in re.findall(r"`([^`]+)`", prose):
        for word in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", code):
            assert word in known or "/" in code, f"{word} in `{code}`"
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"\b(?:scripts|ditcli)/[\w./]+\w", README):
        assert (ROOT / target).exists(), target


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as server:
        yield server


def pictures(folder: Path, num: int, side: int = 40) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(folder.name))
    for i in range(1, num + 1):
        Image.fromarray(rng.integers(0, 256, (side, side + 6, 3), dtype=np.uint8)).save(folder / f"{i:06}.jpg")


def save_extractor(path: Path) -> None:
    """An ONNX file that takes pictures for their mean colours."""
    mean = helper.make_node("ReduceMean", ["image", "axes"], ["features"], keepdims=0)
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "h", "w"])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 3])
    axes = numpy_helper.from_array(np.array([2, 3]), "axes")
    graph = helper.make_graph([mean], "colours", [image], [features], [axes])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def furnish(place: Path, hub: Hub) -> None:
    """What the README takes to be there: folders of pictures, VAEs, an extractor, and repositories on the Hub."""
    pictures(place / "celeba" / "img_align_celeba", 12)
    rows = "".join(f"{i:06}.jpg {1 if i % 2 else -1}\n" for i in range(1, 13))
    (place / "celeba" / "list_attr_celeba.txt").write_text(f"12\nMale\n{rows}")
    pictures(place / "photos", 6)
    for name in ("beagle", "pug"):
        pictures(place / "dogs" / name, 4)
    torch.manual_seed(0)
    save_codec(AutoencoderTiny(TINY), place / "taesd")
    hub.add_folder("madebyollin/taesd", place / "taesd")
    hub.add_folder("stabilityai/sd-vae-ft-ema", place / "taesd")
    save_extractor(place / "efficientnet_lite0_features.onnx")

    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "sample_size": 8, "patch_size": 2}
    network = DiTTransformer2DModel(**sizes, in_channels=4, out_channels=8, num_embeds_ada_norm=2)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    DiTPipeline(network.eval(), vae, DDIMScheduler(clip_sample=False)).save_pretrained(place / "xl")
    index = place / "xl" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": {"0": "golden retriever", "1": "tench"}}))
    for name in ("facebook/DiT-XL-2-256", "me/dogs"):
        hub.add_folder(name, place / "xl")
    (place / "onnx").symlink_to("runs/celeba-dit-s-2-128/onnx")  # copied to where there is no torch


def within_budget(line: str) -> str | None:
    """The command with its budget; None for one that is parsed only."""
    name, *words = shlex.split(line)
    if name not in BUDGET or "--devices" in words or "jax" in words:
        return None
    more = BUDGET[name]
    if name == "train" and "--from" not in words:
        more += f" {NETWORK}"
    if "--ema-snapshot-every" in words:
        more += " --ema-snapshot-every 1"
    if name == "fid" and "--num" in words:
        more += " --num 12 --steps 1"
    if name in ("sample", "fid") and "--precision" in words:
        more += " --precision fp32"
    return f"{line} {more}"


def test_the_commands_run_one_after_the_other(hub, tmp_path):
    furnish(tmp_path, hub)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DITCLI_"))}
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment = kept | ours | {"OMP_NUM_THREADS": "1", "DITCLI_CACHE": str(tmp_path / "cache")}
    lines = [line for line in map(within_budget, COMMANDS) if line]
    done = subprocess.run(
        [sys.executable, "-c", RUN_LINES, *lines], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    assert len(lines) > 15


def test_the_reference_is_what_help_says(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from write_reference import OUT, reference

    assert OUT.read_text() == reference(), "run: python scripts/write_reference.py"
