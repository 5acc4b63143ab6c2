"""Every setting of ditcli as a frozen dataclass: defaults, help texts and validation live here and nowhere else.

Free of torch, numpy and click, so that ``ditcli train --help`` reads it in milliseconds. A field made with `option`
becomes a command-line option of the same name with hyphens; ``__post_init__`` raises a ``ValueError`` that names the
field, its value and what is allowed.
"""

from ditcli.config.base import Config, Loss, Precision, WhenDiskFull, option, suggest
from ditcli.config.doctor import DoctorConfig
from ditcli.config.ema import EmaConfig
from ditcli.config.find_lr import FindLrConfig
from ditcli.config.model import (
    CONV_DIT,
    CONV_WIDTHS,
    DIT_SIZES,
    Conditioning,
    DiffusionConfig,
    DiTConfig,
    ModelConfig,
    Prediction,
    ScheduleName,
    Spacing,
    parse_model_name,
)
from ditcli.config.report import ReportConfig
from ditcli.config.sample import Backend, ExportConfig, ExportDtype, SampleConfig, SamplerName, Walk
from ditcli.config.score import METRICS, NETWORKS, FidConfig, FidResize
from ditcli.config.share import PushConfig
from ditcli.config.train import DEFAULT_VAE, DEMO, PRESETS, TrainConfig, default_preset
from ditcli.config.ui import UiConfig
from ditcli.config.vae import TILE, VAE_PRESETS, DecodeConfig, EncodeConfig, TrainVaeConfig, VaeConfig, VaeKind

__all__ = [
    "CONV_DIT",
    "CONV_WIDTHS",
    "DEFAULT_VAE",
    "DEMO",
    "DIT_SIZES",
    "METRICS",
    "NETWORKS",
    "PRESETS",
    "TILE",
    "VAE_PRESETS",
    "Backend",
    "Conditioning",
    "Config",
    "DecodeConfig",
    "DiTConfig",
    "DiffusionConfig",
    "DoctorConfig",
    "EmaConfig",
    "EncodeConfig",
    "ExportConfig",
    "ExportDtype",
    "FidConfig",
    "FidResize",
    "FindLrConfig",
    "Loss",
    "ModelConfig",
    "Precision",
    "Prediction",
    "PushConfig",
    "ReportConfig",
    "SampleConfig",
    "SamplerName",
    "ScheduleName",
    "Spacing",
    "TrainConfig",
    "TrainVaeConfig",
    "UiConfig",
    "VaeConfig",
    "VaeKind",
    "Walk",
    "WhenDiskFull",
    "default_preset",
    "option",
    "parse_model_name",
    "suggest",
]
