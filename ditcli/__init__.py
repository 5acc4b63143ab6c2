"""Train, sample, export and score Diffusion Transformers."""

__version__ = "0.1.0"
