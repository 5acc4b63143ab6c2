"""DINOv2's features against transformers, on the small random network of golden/dinov2, and the command with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import serve
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

from ditcli.cli import main
from ditcli.config import FidConfig, TrainConfig
from ditcli.errors import DitcliError, SettingError
from ditcli.evaluation import dinov2
from ditcli.evaluation.dinov2 import Dinov2Features, load_dinov2
from ditcli.evaluation.extractors import open_extractor
from ditcli.evaluation.features import file_sha256, result_name

GOLDEN = Path(__file__).parent / "golden" / "dinov2"
WIDTH = 32


@pytest.fixture(scope="module")
def extractor() -> Dinov2Features:
    return Dinov2Features(GOLDEN)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "expected.safetensors")


def copy(folder: Path, **changes: Any) -> Path:
    """The network of the golden folder, with other settings."""
    shutil.copytree(GOLDEN, folder, dirs_exist_ok=True)
    values = json.loads((GOLDEN / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    return folder


def test_features_equal_transformers(extractor: Dinov2Features, golden: dict[str, np.ndarray]) -> None:
    features = extractor(golden["in.images_u8"])
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, golden["out.cls_224"], rtol=0, atol=1e-5)


def test_features_equal_transformers_at_the_size_of_the_pretraining(
    extractor: Dinov2Features, golden: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dinov2, "SIDE", 56)
    np.testing.assert_allclose(extractor(golden["in.images_u8"]), golden["out.cls_56"], rtol=0, atol=1e-5)


def test_features_do_not_depend_on_the_batch_nor_on_the_layout(extractor: Dinov2Features) -> None:
    images = np.random.default_rng(0).integers(0, 256, (18, 20, 28, 3), dtype=np.uint8)  # more than go in at once
    together = extractor(images)
    assert together.shape == (18, WIDTH)
    np.testing.assert_allclose(np.concatenate([extractor(image[None]) for image in images]), together, atol=1e-5)
    np.testing.assert_allclose(extractor(torch.from_numpy(images).permute(0, 3, 1, 2)), together, atol=1e-5)
    np.testing.assert_allclose(extractor([images[0], images[1][:12]])[:1], together[:1], atol=1e-5)


def test_half_precision_files_are_computed_in_float32(extractor: Dinov2Features, tmp_path: Path) -> None:
    folder = copy(tmp_path / "half")
    state = {key: value.half() for key, value in load_torch(GOLDEN / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    net = load_dinov2(folder)
    assert {value.dtype for value in net.state_dict().values()} == {torch.float32}
    for key, value in extractor.net.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value.half().float(), rtol=0, atol=0)


def test_the_result_names_the_network_and_is_no_fid(extractor: Dinov2Features) -> None:
    sha256 = file_sha256(GOLDEN / "model.safetensors")
    assert (extractor.weights_sha256, extractor.width, extractor.is_fid) == (sha256, WIDTH, False)
    assert result_name(extractor) == f"FD (dinov2-32x2 {sha256[:8]})"


def test_the_published_sizes_are_known_by_their_names(tmp_path: Path) -> None:
    """The large one's settings, as facebook/dinov2-large has them, give a network of its 304 million weights."""
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "mlp_ratio": 4, "image_size": 518}
    with torch.device("meta"):
        net = dinov2.Dinov2(**dinov2._read_config(copy(tmp_path / "large", **large) / "config.json"))
    assert sum(value.numel() for value in net.parameters()) == 304_367_616
    assert dinov2.SIZES[net.layernorm.normalized_shape[0], len(net.blocks)] == "large"


def test_other_folders_are_refused_with_a_sentence(tmp_path: Path) -> None:
    state = load_torch(GOLDEN / "model.safetensors")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    text = tmp_path / "text"
    copy(text)
    (text / "config.json").write_text("no JSON")
    cut = copy(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((GOLDEN / "model.safetensors").read_bytes()[:5000])
    deep = copy(tmp_path / "deep", num_hidden_layers=3)
    shallow = copy(tmp_path / "shallow", num_hidden_layers=1)
    wide = copy(tmp_path / "wide", image_size=70)
    registers = copy(tmp_path / "registers")
    save_file(state | {"embeddings.register_tokens": torch.zeros(1, 4, WIDTH)}, registers / "model.safetensors")
    for folder, sentence in (
        (tmp_path / "missing", "give a folder with config.json and model.safetensors, or a Hub repository"),
        (GOLDEN / "config.json", "a file, but DINOv2's are a folder with config.json and model.safetensors"),
        (bare, "bare has no model.safetensors, as a folder of DINOv2 weights must; it holds config.json"),
        (text, "config.json is not JSON"),
        (cut, "model.safetensors is damaged"),
        (deep, "model.safetensors does not fit its config.json: .*encoder.layer.2.norm1.weight"),
        (shallow, "model.safetensors does not fit its config.json: unexpected encoder.layer.1"),
        (wide, r"position_embeddings \(1, 17, 32\) instead of \(1, 26, 32\)"),
        (registers, "embeddings.register_tokens"),
        (copy(tmp_path / "vit", model_type="vit"), "describes no DINOv2 .its model_type is 'vit'"),
        (copy(tmp_path / "giant", use_swiglu_ffn=True), "SwiGLU .the giant., which is not supported"),
        (copy(tmp_path / "heads", num_attention_heads=5), "num_attention_heads is 5, but must be a divisor"),
        (copy(tmp_path / "patch", patch_size=[14, 14]), "patch_size is .14, 14., but must be a positive whole"),
        (copy(tmp_path / "act", hidden_act="relu"), "hidden_act is 'relu', but must be gelu"),
        (copy(tmp_path / "ratio", mlp_ratio="4"), "mlp_ratio is '4', but must be a positive number"),
    ):
        with pytest.raises(DitcliError, match=sentence) as told:
            open_extractor("dinov2", weights=str(folder))
        assert "\n" not in str(told.value)


def test_weights_fit_dinov2_alone_and_the_resize_and_the_inception_score_do_not() -> None:
    sides = {"real": "a", "fake": "b"}
    assert FidConfig(**sides, features="dinov2", weights="w").weights == "w"
    TrainConfig(data="a", eval_every=1, eval_features="dinov2", eval_weights="w")
    for settings, sentence in (
        ({"resize": "pytorch-fid"}, "resize is 'pytorch-fid', but must be left out with --features dinov2"),
        ({"metrics": ("is",)}, "without `is`, which only --features inception has"),
    ):
        with pytest.raises(SettingError, match=sentence):
            FidConfig(**sides, features="dinov2", **settings)


# The command


def draw(folder: Path) -> tuple[str, ...]:
    """Two sides of smooth random colours, and the words that score them in DINOv2's features."""
    rng = np.random.default_rng(0)
    for side in ("real", "fake"):
        (folder / side).mkdir()
        for i, colours in enumerate(rng.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)):
            picture = Image.fromarray(colours).resize((32, 32), Image.Resampling.BICUBIC)
            picture.save(folder / side / f"{i}.png")
    return ("fid", "--real", "real", "--fake", "fake", "--features", "dinov2", "--metrics", "fid,kid,pr", "--json")


def test_the_command_scores_in_these_features(
    extractor: Dinov2Features,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DITCLI_CACHE", str(tmp_path / "cache"))
    words = (*draw(tmp_path), "--weights", str(GOLDEN), "--save-stats", "real.npz", "--device", "cpu")
    monkeypatch.setattr(sys, "argv", ["ditcli", *words])
    with pytest.raises(SystemExit) as stop:
        main.run()
    captured = capsys.readouterr()
    assert not stop.value.code, captured.err
    result = json.loads(captured.out)
    assert result["extractor"] == {
        "name": extractor.name,
        "sha256": extractor.weights_sha256,
        "width": WIDTH,
        "resize": "pillow-bicubic to 224x224",
    }
    assert result["scores"]["fid"]["name"] == f"FD ({extractor.name})"
    assert result["scores"]["fid"]["value"] > 0
    assert set(result["scores"]) == {"fid", "kid", "precision", "recall"}
    saved = np.load("real.npz")
    features = extractor([np.array(Image.open(path)) for path in sorted((tmp_path / "real").iterdir())])
    np.testing.assert_allclose(saved["mu"], features.mean(axis=0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(saved["sigma"], np.cov(features, rowvar=False), rtol=0, atol=1e-4)


def test_weights_come_from_the_hub_once_and_without_it_a_sentence_says_what_to_do(tmp_path: Path) -> None:
    """The Hub's client reads its environment at import, so each call is a process of its own."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        home = {"DITCLI_CACHE": "cache", "HF_HOME": "hub", "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
        root = {"PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, *words]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | home | root | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    words = ("-m", "ditcli", *draw(tmp_path))
    with serve() as hub:
        hub.add_folder("facebook/dinov2-large", GOLDEN)
        done = run(*words, HF_ENDPOINT=hub.url)
        assert done.returncode == 0, done.stderr
        assert sorted(line.rpartition("/")[2] for line in hub.downloads()) == ["config.json", "model.safetensors"]
    find = (
        "from ditcli import errors, hub\n"
        "try: print(hub.find_dinov2('facebook/dinov2-large'))\n"
        "except errors.DitcliError as error: print(error)"
    )
    kept = Path(run("-c", find, HF_HUB_OFFLINE="1").stdout.strip())
    assert (tmp_path / kept / "model.safetensors").read_bytes() == (GOLDEN / "model.safetensors").read_bytes()
    assert run("-c", find, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME="empty").stdout.strip() == (
        "facebook/dinov2-large is not in the cache, or not all of it, and the Hub cannot be reached: connect to the "
        "network and run the same command again, or bring its config.json and model.safetensors in a folder and give "
        "that with --weights FOLDER."
    )
