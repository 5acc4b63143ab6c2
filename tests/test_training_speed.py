"""A faster or smaller step is the same step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from test_training import run_tiny

from ditcli.config import TrainConfig
from ditcli.errors import SettingError
from ditcli.training.loop import apply_gradients
from ditcli.training.step import next_micro_batch


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory) -> None:
    os.environ["DITCLI_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["DITCLI_CACHE"]


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments(clip, poison):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(value: float) -> torch.Tensor:
        model(torch.ones(1, 3)).sum().backward()
        model.weight.grad[0, 0] *= value
        return apply_gradients(optimizer, 1e-2, clip)

    def everything() -> list[torch.Tensor]:
        moments = [value for p in model.parameters() for value in optimizer.state[p].values()]
        return [tensor.clone() for tensor in [*model.state_dict().values(), *moments]]

    assert step(1.0).isfinite()
    before = everything()
    assert not step(poison).isfinite()
    assert all(torch.equal(one, other) for one, other in zip(before, everything(), strict=True))
    step(1.0)
    assert not torch.equal(before[0], model.weight)
    assert model.weight.isfinite().all()


def test_micro_batches_divide_the_batch():
    assert [next_micro_batch(12, size) for size in (12, 6, 4, 3, 2)] == [6, 3, 2, 1, 1]
    assert TrainConfig(micro_batch="4", batch_size=8).micro_batch == 4
    assert TrainConfig(micro_batch="auto").micro_batch == "auto"
    for wrong in ("3", "0", "all"):
        with pytest.raises(SettingError, match="micro-batch"):
            TrainConfig(micro_batch=wrong, batch_size=8)


def test_micro_batch_auto_trains(tmp_path: Path):
    assert run_tiny(tmp_path, steps=2, micro_batch="auto").saved_steps() == [2]
