"""How many drawn digits a classifier reads as what was asked for: it is trained here, on the real ones.

    python scripts/read_digits.py MNIST SAMPLES [--at-least 0.95]

MNIST is the folder of the idx files, SAMPLES what `ditcli sample` wrote (`3_seed7.png` is a 3). Prints JSON: the share
that is read right of the drawn digits and, to show what the classifier is worth, of the 10,000 real test digits. Exits
with 1 below `--at-least`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditcli.data.idx import read_idx
from ditcli.images import read_image

BATCH, EPOCHS, LR = 128, 2, 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mnist", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--at-least", type=float, default=0.0)
    args = parser.parse_args()
    reader = train_reader(*read_split(args.mnist, "train"))
    pictures, labels = read_split(args.mnist, "t10k")
    real = (read(reader, pictures) == labels).float().mean().item()

    paths = sorted(args.samples.glob("[0-9]_seed*.png"))
    if not paths:
        sys.exit(f"{args.samples} has no digits: they are named as in 3_seed7.png.")
    drawn = torch.stack([torch.from_numpy(np.array(read_image(path).convert("L"))) for path in paths])
    asked = torch.tensor([int(path.name[0]) for path in paths])
    right = read(reader, drawn) == asked
    share = right.float().mean().item()
    of_each = {str(digit): round(right[asked == digit].float().mean().item(), 3) for digit in asked.unique().tolist()}
    print(json.dumps({"drawn": len(paths), "right": round(share, 4), "real": round(real, 4), "of_each_digit": of_each}))
    if share < args.at_least:
        sys.exit(f"{share:.1%} of the drawn digits are read as what was asked for; {args.at_least:.0%} are wanted.")


def read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """uint8 pictures (N, 28, 28) and int64 labels (N,) of `train` or `t10k`, gzipped or not."""
    pictures, labels = (next(folder.glob(f"{split}-{kind}*")) for kind in ("images", "labels"))
    return torch.from_numpy(read_idx(pictures, 3).copy()), torch.from_numpy(read_idx(labels, 1).astype(np.int64))


def train_reader(pictures: Tensor, labels: Tensor) -> nn.Module:
    """A small convolutional network, right on 99 of 100 real digits after some 20 seconds of a core."""
    torch.manual_seed(0)
    reader = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(64 * 7 * 7, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(reader.parameters(), lr=LR)
    steps = EPOCHS * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    order = torch.cat([torch.randperm(len(labels)) for _ in range(EPOCHS)])
    for rows in order[: steps * BATCH].split(BATCH):
        F.cross_entropy(reader(_scaled(pictures[rows])), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return reader.eval()


@torch.inference_mode()
def read(reader: nn.Module, pictures: Tensor) -> Tensor:
    """The digit of each picture, int64 (N,)."""
    return torch.cat([reader(_scaled(part)).argmax(1) for part in pictures.split(1000)])


def _scaled(pictures: Tensor) -> Tensor:
    return pictures[:, None].float() / 127.5 - 1


if __name__ == "__main__":
    main()
