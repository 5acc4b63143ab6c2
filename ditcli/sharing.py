"""`ditcli pull` and `ditcli push`: models from the Hub and to it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ditcli
from ditcli import hub, runs
from ditcli.codecs.folder import read_autoencoder, save_codec
from ditcli.config import ModelConfig, PushConfig, SampleConfig
from ditcli.errors import DitcliError, SettingError
from ditcli.info import describe, read_about
from ditcli.models.weights import load_dit, read_model
from ditcli.progress import say
from ditcli.sampling import sample
from ditcli.training.checkpoints import write_weights
from ditcli.training.metrics import Row, read_metrics

MOST_CLASSES_IN_A_GRID = 8
# Of the settings of a run, those that say what was learnt and how.
TOLD = (
    *("image_size", "flip", "loss", "label_dropout", "batch_size", "lr", "lr_schedule", "warmup_steps"),
    *("weight_decay", "clip_grad", "ema_decay", "precision", "freeze", "lora_rank", "seed"),
)


def pull(name: str) -> Path:
    """Fetch a Hub repository's model with its codec and its base, or a VAE; returns where it lies."""
    path = hub.find_any(name)
    if path.name == "config.json":
        return path.parent
    config, _ = read_model(path)
    if config.codec != "pixels":
        hub.find_codec(config.codec)
    if config.lora_rank:
        hub.find_checkpoint(config.base)
    return path


def push(config: PushConfig) -> str:
    """Share a run's newest averaged weights, or a checkpoint; the repository's page, or the folder of a dry run.

    Raises SettingError for what cannot be shared, DitcliError where the Hub refuses or cannot be reached.
    """
    checkpoint = hub.find_checkpoint(config.run)
    if not runs.is_checkpoint(checkpoint):
        raise SettingError(f"run is {config.run!r}, a model of others: only runs and checkpoints of ditcli are shared.")
    if config.dry_run:
        folder = Path(config.out or config.repo.split("/")[1])
        if folder.exists():
            raise SettingError(f"{folder} is there already: remove it, or give another --out.")
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            write_folder(partial, checkpoint, config)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return str(folder)
    from huggingface_hub import HfApi

    api, step = HfApi(), runs.read_model_config(checkpoint).step
    with _explained(config.repo), tempfile.TemporaryDirectory() as temporary:
        page = api.create_repo(config.repo, private=config.private, exist_ok=True)  # a refusal comes before the work
        folder = Path(temporary) / "model"
        write_folder(folder, checkpoint, config)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        say(f"Uploading {size / 1e6:,.1f} MB to {page}.")
        api.upload_folder(
            repo_id=config.repo, folder_path=folder, commit_message=f"ditcli {ditcli.__version__}: step {step:,}"
        )
    return str(page)


def write_folder(folder: Path, checkpoint: Path, config: PushConfig) -> None:
    """All that is uploaded: weights, config, codec where it is a local one, sample grid, metrics and model card."""
    model, weights = read_model(checkpoint)
    if config.merge and not model.lora_rank:
        raise SettingError(f"merge is on, but {config.run} is no adapter: leave it out.")
    if config.merge:
        network, _ = load_dit(checkpoint)
        model, weights = replace(model, lora_rank=0), network.state_dict()
    base_is_local = model.base != "" and hub.HubName.parse(model.base) is None
    if model.lora_rank and base_is_local:
        raise SettingError(f"{config.run} is an adapter of {model.base}, which others do not have: give --merge.")
    folder.mkdir(parents=True)
    shared = replace(model, base="" if base_is_local else model.base)
    if model.codec != "pixels" and Path(model.codec).is_dir():
        save_codec(read_autoencoder(Path(model.codec)), folder / "vae")
        shared = replace(shared, codec=runs.SHARED_CODEC)
    if shared == runs.read_model_config(checkpoint):
        shutil.copyfile(checkpoint, folder / hub.SHARED_MODEL)
    else:
        write_weights(folder / hub.SHARED_MODEL, weights, shared)
    run = runs.RunDir(checkpoint.parent.parent)
    about = _about(checkpoint, shared)
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    if run.metrics_file.is_file():
        _copy_own(run, run.metrics_file, folder / "metrics.csv")
    _add_grid(folder / "samples.png", checkpoint, run)
    rows = read_metrics(run.metrics_file, Row)
    facts = describe(str(checkpoint))
    card = model_card(
        config, shared, about, facts, loss=next((row.loss for row in reversed(rows) if row.step <= model.step), None)
    )
    (folder / "README.md").write_text(card)


def _about(checkpoint: Path, model: ModelConfig) -> dict[str, Any]:
    """The run's config.json without what only this machine knows."""
    about = read_about(checkpoint)
    train, data = about.get("train", {}), about.get("data", {})
    kept = {name: train[name] for name in TOLD if name in train}
    if train:
        kept["data"] = Path(train["data"]).name
    return {
        "model": model.to_dict(),
        "train": kept,
        "data": {name: data[name] for name in ("layout", "images", "classes") if name in data},
        "versions": about.get("versions", {}),
    }


def _copy_own(run: runs.RunDir, path: Path, other: Path) -> None:
    """Copy a file of a run; SettingError for a link out of it, which would publish a file of somewhere else."""
    if not path.resolve().is_relative_to(run.path.resolve()):
        raise SettingError(f"{path} is a link to {path.resolve()}, out of the run: put the file itself there.")
    shutil.copyfile(path, other)


def _add_grid(path: Path, checkpoint: Path, run: runs.RunDir) -> None:
    """The run's last sample grid, or one drawn now."""
    grids = sorted(run.samples.glob("step-*.png")) if runs.is_run(run.path) else []
    if grids:
        _copy_own(run, grids[-1], path)
        return
    say("The run has no sample grid: drawing one.")
    names = read_model(checkpoint)[0].class_names[:MOST_CLASSES_IN_A_GRID]
    labels = tuple(str(i) for i in range(len(names)))
    with tempfile.TemporaryDirectory() as temporary:
        config = SampleConfig(model=str(checkpoint), labels=labels, num=4, grid=True, out=temporary)
        grid = sample(config).grid
        assert grid is not None, "a grid was asked for"
        shutil.copyfile(grid, path)


def model_card(
    config: PushConfig, model: ModelConfig, about: dict[str, Any], facts: dict[str, Any], *, loss: float | None
) -> str:
    """README.md with the Hub's metadata at its top."""
    name = config.repo.split("/")[1]
    data, train = about["data"], about["train"]
    base = hub.HubName.parse(model.base)
    head = {"license": config.license, "library_name": "ditcli", "pipeline_tag": "unconditional-image-generation"}
    head |= {"base_model": base.repo} if base else {}
    front = "\n".join(f"{key}: {value}" for key, value in head.items())
    adapter = " (low-rank adapter)" if model.lora_rank else ""
    classes = ", ".join(model.class_names[:20]) + (" ..." if len(model.class_names) > 20 else "")
    trained = f"{data['images']:,} images of {train.get('data') or 'a folder'}" if "images" in data else "images"
    rows = {
        "architecture": f"{facts['architecture']}, {model.dit.conditioning}{adapter}",
        "parameters": f"{facts['parameters']:,}",
        "GFLOPs": facts["gflops"],
        "image size": model.image_size,
        "codec": "its own, in `vae/`" if model.codec == runs.SHARED_CODEC else model.codec,
        "diffusion": f"{model.diffusion.schedule} schedule, predicts {model.diffusion.prediction}",
        "steps": f"{model.step:,}",
        **({"training loss": f"{loss:.4f}"} if loss is not None else {}),
        **({"classes": classes} if classes else {}),
        **({"fine-tuned from": model.base} if model.base else {}),
    }
    settings = {key: value for key, value in train.items() if key != "data" and value not in (None, [], 0, False)}
    labels = f" --labels {json.dumps(model.class_names[0])}" if model.class_names else ""
    return f"""---
{front}
tags:
- dit
- diffusion
- image-generation
---

# {name}

A Diffusion Transformer (DiT, [arXiv 2212.09748](https://arxiv.org/abs/2212.09748)), trained with ditcli
{ditcli.__version__} on {trained}.

![samples](samples.png)

## How to sample

```
ditcli sample --model {config.repo}{labels} --cfg 4
```

## The model

{_table(rows)}

## How it was trained

{_table({key.replace("_", " "): value for key, value in settings.items()}) if settings else "Not recorded."}
"""


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """The client's errors as sentences."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        if code in (401, 403):
            raise DitcliError(
                f"the Hub does not let you write to {repo}: `hf auth login` with a token that may write there."
            ) from error
        raise DitcliError(f"the Hub refused the upload to {repo}: {error}") from error
    except (HTTPError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise DitcliError(
            f"the Hub cannot be reached ({error}). Run the same command again, or write the folder with --dry-run."
        ) from error
