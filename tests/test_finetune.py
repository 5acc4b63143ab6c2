"""Fine-tuning: what is kept of the source, what is new, what is frozen, and adapters."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_dit import MODERN

from ditcli.config import SampleConfig, TrainConfig
from ditcli.errors import CheckpointError, ModelNotFoundError, SettingError
from ditcli.models.dit import DiT
from ditcli.models.lora import LoRALinear, add_adapters, merge
from ditcli.models.weights import load_dit
from ditcli.runs import RunDir, read_model_config, state_file
from ditcli.sampling import sample
from ditcli.training.finetune import TABLE
from ditcli.training.metrics import read_metrics
from ditcli.training.setup import describe, prepare
from ditcli.training.train import train

SOURCE = {
    "pixels": True,
    "image_size": 8,
    "model": "DiT-S/2",
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "schedule": "cosine",
    "prediction": "v",
}
RUN = {
    "batch_size": 4,
    "steps": 6,
    "lr": 1e-3,
    "log_every": 2,
    "checkpoint_every": 3,
    "sample_every": 0,
    "precision": "fp32",
    "device": "cpu",
}


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory) -> None:
    os.environ["DITCLI_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["DITCLI_CACHE"]


def pictures(folder: Path, *classes: str, side: int = 16) -> str:
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> RunDir:
    """A run of three classes."""
    folder = tmp_path_factory.mktemp("source")
    data = pictures(folder / "data", "a", "b", "c")
    return train(TrainConfig.from_dict(RUN | SOURCE | {"data": data, "out": str(folder / "run")}))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return pictures(tmp_path_factory.mktemp("data"), "cat", "dog")


def tune(source: RunDir, data: str, out: Path, **changes) -> RunDir:
    return train(TrainConfig.from_dict(RUN | {"data": data, "out": str(out), "from": str(source.path)} | changes))


def weights_of(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.newest_checkpoint())


def test_a_tuned_model_begins_as_its_source(source, data, tmp_path):
    """With a learning rate of next to nothing all but the label table is the source's, and the null class is kept."""
    run = tune(source, data, tmp_path / "run", lr=1e-30, steps=1)
    before, after = weights_of(source), weights_of(run)
    theirs, ours = before.pop(TABLE), after.pop(TABLE)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, msg=name)
    assert ours.shape == (3, 32)
    torch.testing.assert_close(ours[-1], theirs[-1])
    assert (ours[:2] - theirs[-1]).abs().max() < 0.2  # about the null class, and not it
    assert (ours[0] - ours[1]).abs().max() > 0.01
    then, now = read_model_config(source.newest_checkpoint()), read_model_config(run.newest_checkpoint())
    assert (now.diffusion, now.codec, now.image_size) == (then.diffusion, then.codec, then.image_size)
    assert now.class_names == ("cat", "dog")
    assert now.base == str(source.newest_checkpoint())
    saved = json.loads(run.config_file.read_text())["train"]
    assert (saved["schedule"], saved["prediction"], saved["image_size"], saved["depth"]) == ("cosine", "v", 8, 2)


def test_a_run_of_a_version_with_fewer_parts_goes_on(source, data, tmp_path):
    run = tune(source, data, tmp_path / "run", steps=1)
    saved = json.loads(run.config_file.read_text())
    for name in ("mlp", "rope", "qk_norm"):
        del saved["train"][name]
        del saved["model"]["dit"][name]
    run.config_file.write_text(json.dumps(saved))
    assert tune(source, data, tmp_path / "run", steps=2).saved_steps()[-1] == 2


def test_the_same_classes_keep_their_label_table(source, data, tmp_path):
    same = pictures(tmp_path / "same", "a", "b", "c")
    run = tune(source, same, tmp_path / "run", lr=1e-30, steps=1)
    torch.testing.assert_close(weights_of(run)[TABLE], weights_of(source)[TABLE])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "linear"}, "schedule is 'linear', but 'cosine' there"),
        ({"prediction": "eps", "num_timesteps": 500}, "num-timesteps is 500, but 1000 there.*prediction is 'eps'"),
        ({"model": "DiT-B/2"}, "depth is 12, but 2 there; width is 768, but 32 there"),
        ({"patch_size": 4}, "patch-size is 4, but 2 there"),
        ({"learn_sigma": True}, "learn-sigma is True, but False there"),
        ({"conditioning": "adaln"}, "conditioning is 'adaln', but 'adaln-zero' there"),
    ],
)
def test_what_contradicts_the_source_is_refused(source, data, tmp_path, changes, message):
    with pytest.raises(SettingError, match=message):
        tune(source, data, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
    for name in ("freeze", "lora_rank"):
        with pytest.raises(SettingError, match="left out without --from"):
            TrainConfig.from_dict({"data": data, name: 3 if name == "lora_rank" else ["x"]})


def test_what_agrees_with_the_source_may_be_said_again(source, data, tmp_path):
    tune(source, data, tmp_path / "run", steps=1, **SOURCE)


def test_another_resolution_keeps_every_weight(source, data, tmp_path, capsys):
    run = tune(source, data, tmp_path / "run", image_size=12, lr=1e-30, steps=1)
    before, after = weights_of(source), weights_of(run)
    for name in before.keys() - {TABLE}:
        torch.testing.assert_close(after[name], before[name], msg=name)
    model, config = load_dit(run.newest_checkpoint())
    assert config.dit.input_size == (12, 12)
    assert model(torch.zeros(1, 3, 12, 12), torch.zeros(1), torch.zeros(1, dtype=torch.int64)).shape == (1, 3, 12, 12)
    assert "The source's input is 8x8, this run's 12x12" in capsys.readouterr().err


def test_other_latent_channels_start_embedding_and_head_afresh_and_say_so(source, data, tmp_path, capsys):
    from ditcli.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
    from ditcli.codecs.folder import save_codec

    torch.manual_seed(0)
    sizes = AutoencoderKLConfig(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4)
    save_codec(AutoencoderKL(sizes), tmp_path / "vae")
    vae = {"vae": str(tmp_path / "vae"), "image_size": 16, "lr": 1e-30, "steps": 1}
    run = tune(source, data, tmp_path / "run", **vae)
    assert "The source has 3 latent channels, the codec 4" in capsys.readouterr().err
    before, after = weights_of(source), weights_of(run)
    for name in before.keys() - {
        TABLE,
        "x_embedder.proj.weight",
        "final_layer.linear.weight",
        "final_layer.linear.bias",
    }:
        torch.testing.assert_close(after[name], before[name], msg=name)
    assert after["x_embedder.proj.weight"].shape == (32, 4, 2, 2)
    assert after["final_layer.linear.weight"].abs().max() < 1e-20
    assert read_model_config(run.newest_checkpoint()).codec == str(tmp_path / "vae")

    save_codec(AutoencoderKL(sizes), tmp_path / "another")  # drawn anew: as many channels, other latents
    with pytest.raises(SettingError, match=r"another', but .* was trained on the latents of .*vae': leave it out"):
        tune(run, data, tmp_path / "refused", vae=str(tmp_path / "another"))
    adapter = tune(source, data, tmp_path / "adapter", lora_rank=2, **vae)
    load_dit(adapter.newest_checkpoint())  # it brings its own embedding and head


def test_frozen_weights_stay_to_the_bit(source, data, tmp_path):
    run = tune(source, data, tmp_path / "run", freeze=["blocks.*.attn.*", "x_embedder"])
    before, after = weights_of(source), weights_of(run)
    frozen = {name for name in before if ".attn." in name or name.startswith("x_embedder.")}
    assert {name for name in before if name != TABLE and torch.equal(before[name], after[name])} == frozen
    saved = load_file(state_file(run.newest_checkpoint()))
    assert not [name for name in saved if name.startswith("optimizer.x_embedder")]
    for pattern, message in (("block.*", "matches no parameter: they begin with blocks"), ("*", "nothing to train")):
        with pytest.raises(SettingError, match=message):
            tune(source, data, tmp_path / "refused", freeze=[pattern])
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("changes", [{"lora_rank": 2}, {"freeze": ["blocks.0.*"]}])
def test_stopped_halfway_it_goes_on_to_the_same_bits(source, data, tmp_path, changes):
    whole = tune(source, data, tmp_path / "whole", **changes)
    tune(source, data, tmp_path / "halves", **changes, steps=3)
    halves = tune(source, data, tmp_path / "halves", **changes)
    for one, other in zip(
        *((weights_of(run), load_file(state_file(run.newest_checkpoint()))) for run in (whole, halves)), strict=True
    ):
        assert one.keys() == other.keys()
        assert [k for k in one if k != "seconds" and not torch.equal(one[k], other[k])] == []
    assert [row.loss for row in read_metrics(whole.metrics_file)][-1] == read_metrics(halves.metrics_file)[-1].loss


# Adapters


def random_network(config) -> DiT:
    torch.manual_seed(0)
    network = DiT(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return network.eval()


@torch.no_grad()
@pytest.mark.parametrize("parts", [{}, MODERN], ids=["paper", "modern"])
@pytest.mark.parametrize("conditioning", ["adaln-zero", "cross-attention"])
def test_fresh_adapters_change_nothing_and_merged_ones_equal_applied_ones(conditioning, parts):
    from ditcli.config import DiTConfig

    config = DiTConfig(
        input_size=(8, 8), in_channels=3, out_channels=3, width=32, depth=2, num_heads=2, num_classes=3,
        conditioning=conditioning, **parts,
    )  # fmt: skip
    network, adapted = random_network(config), random_network(config)
    add_adapters(adapted, 4)
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 900.0]), torch.tensor([0, 3])
    assert torch.equal(network(x, t, labels), adapted(x, t, labels))
    adapters = [module for module in adapted.modules() if isinstance(module, LoRALinear)]
    assert len(adapters) == 2 * (4 if conditioning == "adaln-zero" else 7)
    for adapter in adapters:
        adapter.lora_up.normal_(std=0.1)
    trained = {name: value for name, value in adapted.state_dict().items() if "lora" in name}
    merged = DiT(config)
    merged.load_state_dict(merge(network.state_dict(), trained))
    difference = (adapted(x, t, labels) - network(x, t, labels)).abs().max()
    assert difference > 0.01
    torch.testing.assert_close(merged.eval()(x, t, labels), adapted(x, t, labels), atol=1e-5, rtol=1e-5)


def test_an_adapter_is_small_learns_and_samples_with_or_without_its_base_named(source, data, tmp_path):
    run = tune(source, data, tmp_path / "run", lora_rank=2, steps=40, lr=1e-2, checkpoint_every=40)
    saved = weights_of(run)
    assert all("lora" in name or name == TABLE for name in saved)
    assert run.newest_checkpoint().stat().st_size < 0.5 * source.newest_checkpoint().stat().st_size
    assert not torch.equal(saved["blocks.0.attn.qkv.lora_up"], torch.zeros_like(saved["blocks.0.attn.qkv.lora_up"]))
    facts = describe(prepare(TrainConfig.from_dict(RUN | {"data": data, "from": str(source.path), "lora_rank": 2})))
    assert facts["trainable"] == sum(value.numel() for value in saved.values())

    drawn = []
    for i, named in enumerate(({"model": str(run.path)}, {"model": str(source.path), "adapter": str(run.path)},
                               {"adapter": str(run.path)})):  # fmt: skip
        samples = sample(SampleConfig(**named, labels=("dog",), steps=3, out=str(tmp_path / str(i)), device="cpu"))
        drawn.append(np.array(Image.open(samples.images[0].path)))
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] == drawn[2]).all()
    raw, _ = load_dit(run.newest_checkpoint(), ema=False)
    averaged, _ = load_dit(run.newest_checkpoint())
    assert not torch.equal(raw.blocks[0].attn.qkv.weight, averaged.blocks[0].attn.qkv.weight)

    with pytest.raises(CheckpointError, match="is no low-rank adapter"):
        load_dit(source.newest_checkpoint(), adapter=source.newest_checkpoint())
    with pytest.raises(CheckpointError, match="is an adapter itself"):
        load_dit(run.newest_checkpoint(), adapter=run.newest_checkpoint())


def test_an_adapter_without_its_base_says_what_is_missing(source, data, tmp_path):
    moved = train(TrainConfig.from_dict(RUN | SOURCE | {"data": data, "out": str(tmp_path / "base"), "steps": 1}))
    run = tune(moved, data, tmp_path / "run", lora_rank=2, steps=1)
    wider = train(
        TrainConfig.from_dict(RUN | SOURCE | {"data": data, "out": str(tmp_path / "wide"), "steps": 1, "width": 64})
    )
    with pytest.raises(CheckpointError, match="does not fit"):
        load_dit(wider.newest_checkpoint(), adapter=run.newest_checkpoint())
    moved.path.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelNotFoundError, match=str(moved.path)):
        load_dit(run.newest_checkpoint())
    load_dit(RunDir(tmp_path / "elsewhere").newest_checkpoint(), adapter=run.newest_checkpoint())


def test_tuning_the_golden_pipeline_keeps_its_conventions(shared, tmp_path):
    folder = shared / "golden" / "diffusers_pipeline"
    data = pictures(tmp_path / "data", "cat", "dog", side=64)
    run = train(
        TrainConfig.from_dict(RUN | {"data": data, "from": str(folder), "out": str(tmp_path / "run"), "steps": 2})
    )
    _, theirs = load_dit(folder)
    _, ours = load_dit(run.newest_checkpoint())
    assert ours.diffusion == theirs.diffusion
    assert ours.dit.frequency_divisor == 127
    assert ours.dit.mlp_norm_eps == 1e-5
    assert (ours.codec, ours.image_size, ours.class_names) == (theirs.codec, 64, ("cat", "dog"))
