"""The networks of `dit` and `conv` in JAX: a pure function over the same weights, by the same names.

Shapes: N images, T patches, D width, C channels, H x W input, p patch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array, lax

from ditcli.config import DiTConfig

Weights = Mapping[str, Array]
Rotation = tuple[Array, Array] | None  # cosines and sines, (T, d/2) each


def apply(weights: Weights, config: DiTConfig, x: Array, t: Array, labels: Array) -> Array:
    """What the torch module makes of x (N, C, H, W), the network's time t (N,) and integer labels (N,)."""
    if not config.conv_widths:
        return _dit(weights, config, x, t, labels)
    skips = [x]  # (N, C, H, W), (N, W0, H/2, W/2), ...
    last = len(config.conv_widths) - 1
    for i in range(last):
        skips.append(jax.nn.silu(_convolve(weights, f"down.{i}", skips[-1], stride=2, padding=1)))
    x = _convolve(weights, f"down.{last}", skips[-1], stride=2, padding=1)
    x = _dit(weights, config, x, t, labels)
    c = jax.nn.silu(operator.add(*_embed(weights, config, t, labels)))  # (N, D)
    for i, skip in enumerate(reversed(skips)):
        joined = jnp.concatenate([_double(weights, f"up.{i}", x), skip], axis=1)
        shift, scale = jnp.split(_linear(weights, f"merge_modulation.{i}", c)[:, :, None, None], 2, axis=1)
        x = jax.nn.silu(_convolve(weights, f"merge.{i}", joined, stride=1, padding=1) * (1 + scale) + shift)
    return _convolve(weights, "output", x, stride=1, padding=1)  # (N, C, H, W)


def _dit(weights: Weights, config: DiTConfig, x: Array, t: Array, labels: Array) -> Array:
    p, conditioning = config.patch_size, config.conditioning
    height, width = x.shape[2] // p, x.shape[3] // p
    x = _convolve(weights, "x_embedder.proj", x, stride=p, padding=0)  # (N, D, H/p, W/p)
    x = x.reshape(*x.shape[:2], -1).swapaxes(1, 2) + _positions(height, width, config.width)  # (N, T, D)
    time, label = _embed(weights, config, t, labels)  # (N, D) each
    c = jax.nn.silu(time + label)  # (N, D)
    tokens = jnp.stack([time, label], axis=1)  # (N, 2, D)
    rotation = _rotations(height, width, config.width // config.num_heads) if config.rope else None
    if conditioning == "in-context":
        x = jnp.concatenate([tokens, x], axis=1)  # (N, 2 + T, D)
        rotation = rotation and _padded(*rotation)
    for i in range(config.depth):
        x = _block(weights, f"blocks.{i}", config, x, c, tokens, rotation)
    x = x[:, -height * width :]  # (N, T, D)
    if conditioning.startswith("adaln"):
        shift, scale = jnp.split(_linear(weights, "final_layer.adaLN_modulation.1", c), 2, axis=1)
        x = _modulate(_norm(x), shift, scale)
    else:
        x = _scaled_norm(weights, "final_layer.norm_final", x)
    x = _linear(weights, "final_layer.linear", x).reshape(-1, height, width, p, p, _out_channels(config))
    return x.transpose(0, 5, 1, 3, 2, 4).reshape(len(x), -1, height * p, width * p)  # (N, C, H, W)


def _block(
    weights: Weights, name: str, config: DiTConfig, x: Array, c: Array, tokens: Array, rotation: Rotation
) -> Array:
    """One of the four ways of conditioning (paper section 3.2), as in `dit`; c (N, D) is after its activation."""

    def attend(x: Array) -> Array:
        return _attend(weights, f"{name}.attn", config, x, rotation)

    def mlp(x: Array) -> Array:
        return _mlp(weights, f"{name}.mlp", config, x)

    def norm(part: str, x: Array, eps: float = 1e-6) -> Array:
        return _scaled_norm(weights, f"{name}.{part}", x, eps)

    mlp_eps = config.mlp_norm_eps
    match config.conditioning:
        case "adaln-zero":
            parts = jnp.split(_linear(weights, f"{name}.adaLN_modulation.1", c), 6, axis=1)  # (N, D) each
            shift1, scale1, gate1, shift2, scale2, gate2 = parts
            x = x + gate1[:, None] * attend(_modulate(_norm(x), shift1, scale1))
            return x + gate2[:, None] * mlp(_modulate(_norm(x, mlp_eps), shift2, scale2))
        case "adaln":
            parts = jnp.split(_linear(weights, f"{name}.adaLN_modulation.1", c), 4, axis=1)
            shift1, scale1, shift2, scale2 = parts
            x = x + attend(_modulate(_norm(x), shift1, scale1))
            return x + mlp(_modulate(_norm(x, mlp_eps), shift2, scale2))
        case "cross-attention":
            x = x + attend(norm("norm1", x))
            x = x + _attend_to(weights, f"{name}.cross_attn", config, norm("norm2", x), tokens)
            return x + mlp(norm("norm3", x, mlp_eps))
        case "in-context":
            x = x + attend(norm("norm1", x))
            return x + mlp(norm("norm2", x, mlp_eps))


def _attend(weights: Weights, name: str, config: DiTConfig, x: Array, rotation: Rotation) -> Array:
    qkv = _linear(weights, f"{name}.qkv", x).reshape(*x.shape[:2], 3, config.num_heads, -1)  # (N, T, 3, heads, d)
    q, k = (_rotate(part, rotation) for part in _normed(weights, name, config, qkv[:, :, 0], qkv[:, :, 1]))
    attended = jax.nn.dot_product_attention(q, k, qkv[:, :, 2])  # (N, T, heads, d)
    return _linear(weights, f"{name}.proj", attended.reshape(x.shape))  # (N, T, D)


def _attend_to(weights: Weights, name: str, config: DiTConfig, x: Array, tokens: Array) -> Array:
    q = _linear(weights, f"{name}.q", x).reshape(*x.shape[:2], config.num_heads, -1)  # (N, T, heads, d)
    kv = _linear(weights, f"{name}.kv", tokens).reshape(*tokens.shape[:2], 2, config.num_heads, -1)
    q, k = _normed(weights, name, config, q, kv[:, :, 0])
    attended = jax.nn.dot_product_attention(q, k, kv[:, :, 1])  # (N, T, heads, d)
    return _linear(weights, f"{name}.proj", attended.reshape(x.shape))  # (N, T, D)


def _normed(weights: Weights, name: str, config: DiTConfig, q: Array, k: Array) -> tuple[Array, Array]:
    """Queries and keys (N, T, heads, d), normalised where the config has it so."""
    if not config.qk_norm:
        return q, k
    return tuple(_norm(x) * weights[f"{name}.{part}_norm.weight"] for x, part in ((q, "q"), (k, "k")))


def _mlp(weights: Weights, name: str, config: DiTConfig, x: Array) -> Array:
    hidden = _linear(weights, f"{name}.fc1", x)
    if config.mlp == "swiglu":
        gate, value = jnp.split(hidden, 2, axis=-1)
        return _linear(weights, f"{name}.fc2", jax.nn.silu(gate) * value)
    return _linear(weights, f"{name}.fc2", jax.nn.gelu(hidden, approximate=True))


def _embed(weights: Weights, config: DiTConfig, t: Array, labels: Array) -> tuple[Array, Array]:
    """Of the time and of the label, (N, D) each."""
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(128, dtype=jnp.float32) / config.frequency_divisor)
    angles = t[:, None] * frequencies
    hidden = _linear(weights, "t_embedder.mlp.0", jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1))
    time = _linear(weights, "t_embedder.mlp.2", jax.nn.silu(hidden))
    return time, weights["y_embedder.embedding_table.weight"][labels]


def _positions(height: int, width: int, dim: int) -> Array:
    """`dit.sincos_positions`: (height * width, dim), half of `dim` for the column, half for the row."""
    omega = 10000 ** -(jnp.arange(dim // 4, dtype=jnp.float32) / (dim // 4))
    of_row, of_column = (
        jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        for angles in (jnp.arange(side, dtype=jnp.float32)[:, None] * omega for side in (height, width))
    )
    shape = (height, width, dim // 2)
    both = [jnp.broadcast_to(of_column[None], shape), jnp.broadcast_to(of_row[:, None], shape)]
    return jnp.concatenate(both, axis=-1).reshape(height * width, dim)


def _rotations(height: int, width: int, dim: int) -> tuple[Array, Array]:
    """`dit.rotations`: cosines and sines, (height * width, dim / 2) each."""
    frequencies = 100 ** -(jnp.arange(dim // 4, dtype=jnp.float32) / (dim // 4))
    rows, columns = (jnp.arange(side, dtype=jnp.float32)[:, None] * frequencies for side in (height, width))
    shape = (height, width, dim // 4)
    both = [jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None], shape)]
    angles = jnp.concatenate(both, axis=-1).reshape(height * width, dim // 2)
    return jnp.cos(angles), jnp.sin(angles)


def _padded(cos: Array, sin: Array) -> tuple[Array, Array]:
    """With the two tokens in front, which are not turned."""
    return jnp.pad(cos, ((2, 0), (0, 0)), constant_values=1), jnp.pad(sin, ((2, 0), (0, 0)))


def _rotate(x: Array, rotation: Rotation) -> Array:
    """`dit.rotate`, of x (N, T, heads, d)."""
    if rotation is None:
        return x
    cos, sin = (part[:, None] for part in rotation)  # (T, 1, d/2) each
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _linear(weights: Weights, name: str, x: Array) -> Array:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(x: Array, eps: float = 1e-6) -> Array:
    return (x - x.mean(axis=-1, keepdims=True)) * lax.rsqrt(x.var(axis=-1, keepdims=True) + eps)


def _scaled_norm(weights: Weights, name: str, x: Array, eps: float = 1e-6) -> Array:
    return _norm(x, eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _modulate(x: Array, shift: Array, scale: Array) -> Array:
    return x * (1 + scale[:, None]) + shift[:, None]


def _convolve(weights: Weights, name: str, x: Array, *, stride: int, padding: int) -> Array:
    y = lax.conv(x, weights[f"{name}.weight"], (stride, stride), [(padding, padding)] * 2)
    return y + weights[f"{name}.bias"][:, None, None]


def _double(weights: Weights, name: str, x: Array) -> Array:
    """torch's ConvTranspose2d of kernel 4, stride 2 and padding 1: a convolution of x with zeros in between."""
    kernel = jnp.flip(weights[f"{name}.weight"], (2, 3)).swapaxes(0, 1)
    y = lax.conv_general_dilated(x, kernel, (1, 1), [(2, 2)] * 2, lhs_dilation=(2, 2))
    return y + weights[f"{name}.bias"][:, None, None]


def _out_channels(config: DiTConfig) -> int:
    """Of the DiT itself: between convolutions it gives as many channels as it takes."""
    return config.conv_widths[-1] if config.conv_widths else config.out_channels
