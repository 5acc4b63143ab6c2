"""Diffusion Transformer (arXiv 2212.09748). Shapes: N images, T patches, D width, C channels, H x W input, p patch.

Parameter names are those of the reference implementation (facebookresearch/DiT `models.py`), so its state dicts load
unchanged; positions are computed from the input's own size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ditcli.config import DiTConfig


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q (N, heads, T, d) and k, v (N, heads, S, d)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # torch's fused CPU kernel is 2.6 times slower than two matrix products in bf16; in fp32 it is the faster one.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def sincos_positions(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Fixed 2-D positions, (height * width, dim), float32: half of `dim` for the column, half for the row."""
    rows = torch.arange(height, device=device, dtype=torch.float32)
    columns = torch.arange(width, device=device, dtype=torch.float32)
    omega = 10000 ** -(torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    of_row = _sincos(rows, omega)[:, None].expand(height, width, dim // 2)
    of_column = _sincos(columns, omega)[None].expand(height, width, dim // 2)
    return torch.cat([of_column, of_row], dim=-1).reshape(height * width, dim)


def _sincos(positions: Tensor, omega: Tensor) -> Tensor:
    angles = positions[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rotations(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Rotary positions in 2-D (the axial ones of arXiv 2403.13298): cosines and sines, (2, height * width, dim / 2).

    Of the dim / 2 pairs of a head's numbers one half turns with the row and the other with the column.
    """
    frequencies = 100 ** -(torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    rows = torch.arange(height, device=device, dtype=torch.float32)[:, None] * frequencies
    columns = torch.arange(width, device=device, dtype=torch.float32)[:, None] * frequencies
    shape = (height, width, dim // 4)
    angles = torch.cat([rows[:, None].expand(shape), columns[None].expand(shape)], dim=-1).flatten(0, 1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """The tokens' pairs (x_i, x_{i + d/2}) of x (..., T, d), each turned by its angle of `rotation` (2, T, d/2)."""
    cos, sin = rotation.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def unturned(x: Tensor, rotation: Tensor) -> Tensor:
    return x


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (N, T, D)


class TimestepEmbedder(nn.Module):
    """Sinusoids of the network's time, then an MLP."""

    num_frequencies = 128

    def __init__(self, width: int, divisor: int):
        super().__init__()
        self.divisor = divisor
        self.mlp = nn.Sequential(nn.Linear(2 * self.num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(self.num_frequencies, device=t.device, dtype=torch.float32)
        frequencies = torch.exp(-math.log(10000) * steps / self.divisor)
        angles = t.float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))  # (N, D)


class LabelEmbedder(nn.Module):
    """A table whose last row is the null class; a model without labels has that row alone."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)  # (N, D)


def make_qk_norm(config: DiTConfig) -> nn.Module:
    """LayerNorm of queries or keys (arXiv 2302.05442, section 2), or nothing."""
    return nn.LayerNorm(config.width // config.num_heads, eps=1e-6, bias=False) if config.qk_norm else nn.Identity()


class Attention(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.q_norm, self.k_norm = make_qk_norm(config), make_qk_norm(config)
        self.rotate = rotate if config.rope else unturned
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, T, d) each
        q, k = self.rotate(self.q_norm(q), rotation), self.rotate(self.k_norm(k), rotation)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))  # (N, T, D)


class CrossAttention(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.q_norm, self.k_norm = make_qk_norm(config), make_qk_norm(config)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, T, d)
        k, v = self.kv(tokens).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, 2, d) each
        return self.proj(attend(self.q_norm(q), self.k_norm(k), v).transpose(1, 2).flatten(2))  # (N, T, D)


def gelu(x: Tensor) -> Tensor:
    """GELU with tanh (arXiv 1606.08415, section 2)."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # (1 + tanh u) / 2 is the sigmoid of 2u, an exp where tanh takes many instructions.
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """A gated MLP (arXiv 2002.05202, eq. 6)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


def make_mlp(config: DiTConfig) -> nn.Module:
    return {"gelu": MLP, "swiglu": SwiGLU}[config.mlp](config.width, config.mlp_width)


# The four ways of conditioning (paper section 3.2). Each block takes the patches x (N, T, D), the sum c (N, D) of the
# time's and the label's embedding, the two of them as tokens (N, 2, D), and rotations of its patches; it uses what its
# way needs.


class AdaLNZeroBlock(nn.Module):
    """Adaptive layer norm with gates that start at zero, so that a fresh block is the identity."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, elementwise_affine=False, eps=config.mlp_norm_eps)
        self.mlp = make_mlp(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(self, x: Tensor, c: Tensor, tokens: Tensor, rotation: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # (N, D) each
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), rotation)  # (N, T, D)
        x = x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))  # (N, T, D)
        return x


class AdaLNBlock(nn.Module):
    """Adaptive layer norm without gates."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, elementwise_affine=False, eps=config.mlp_norm_eps)
        self.mlp = make_mlp(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 4 * config.width))

    def forward(self, x: Tensor, c: Tensor, tokens: Tensor, rotation: Tensor) -> Tensor:
        shift1, scale1, shift2, scale2 = self.adaLN_modulation(c).chunk(4, dim=1)  # (N, D) each
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1), rotation)  # (N, T, D)
        x = x + self.mlp(modulate(self.norm2(x), shift2, scale2))  # (N, T, D)
        return x


class CrossAttentionBlock(nn.Module):
    """A transformer block that attends to time and label after attending to itself."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.cross_attn = CrossAttention(config)
        self.norm3 = nn.LayerNorm(config.width, eps=config.mlp_norm_eps)
        self.mlp = make_mlp(config)

    def forward(self, x: Tensor, c: Tensor, tokens: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), rotation)  # (N, T, D)
        x = x + self.cross_attn(self.norm2(x), tokens)  # (N, T, D)
        x = x + self.mlp(self.norm3(x))  # (N, T, D)
        return x


class InContextBlock(nn.Module):
    """A plain transformer block; time and label are tokens of the sequence it works on."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.mlp_norm_eps)
        self.mlp = make_mlp(config)

    def forward(self, x: Tensor, c: Tensor, tokens: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), rotation)  # (N, 2 + T, D)
        x = x + self.mlp(self.norm2(x))  # (N, 2 + T, D)
        return x


class AdaLNFinalLayer(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm_final = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, T, p * p * C)


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm_final = nn.LayerNorm(config.width, eps=1e-6)
        self.linear = nn.Linear(config.width, config.patch_size**2 * config.out_channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(self.norm_final(x))  # (N, T, p * p * C)


def prepend(tokens: Tensor, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    none = torch.stack([rotation.new_ones(2, rotation.shape[2]), rotation.new_zeros(2, rotation.shape[2])])
    return torch.cat([tokens, x], dim=1), torch.cat([none, rotation], dim=1)  # (N, 2 + T, D), (2, 2 + T, d/2)


def leave(tokens: Tensor, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    return x, rotation


class DiT(nn.Module):
    """A network from (noisy input, time, label) to a prediction of the input's size.

    `forward(x, t, labels)` takes x (N, C, H, W) with H and W multiples of the patch size, t (N,) the network's time
    (0..999 for a thousand steps) and integer labels (N,), where ``num_classes`` is the null class. With
    `checkpoint_activations` the backward pass computes each block again from its input (arXiv 1604.06174).
    """

    checkpoint_activations = False

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        block, final, self.join = {
            "adaln-zero": (AdaLNZeroBlock, AdaLNFinalLayer, leave),
            "adaln": (AdaLNBlock, AdaLNFinalLayer, leave),
            "cross-attention": (CrossAttentionBlock, FinalLayer, leave),
            "in-context": (InContextBlock, FinalLayer, prepend),
        }[config.conditioning]
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, config.width)
        self.t_embedder = TimestepEmbedder(config.width, config.frequency_divisor)
        self.y_embedder = LabelEmbedder(config.num_classes, config.width)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.depth))
        self.final_layer = final(config)
        self._initialise()
        # Published state dicts carry the fixed positions, which are computed here.
        self.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: state.pop(f"{prefix}pos_embed", None))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        p = self.config.patch_size
        height, width = x.shape[2] // p, x.shape[3] // p
        x = self.x_embedder(x) + sincos_positions(height, width, self.config.width, x.device)  # (N, T, D)
        time, label = self.t_embedder(t), self.y_embedder(labels)  # (N, D) each
        c = time + label  # (N, D)
        tokens = torch.stack([time, label], dim=1)  # (N, 2, D)
        rotation = rotations(height, width, self.config.width // self.config.num_heads, x.device)  # (2, T, d/2)
        x, rotation = self.join(tokens, x, rotation)  # (N, T or 2 + T, D)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, c, tokens, rotation, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, c, tokens, rotation)
        x = self.final_layer(x[:, -height * width :], c)  # (N, T, p * p * C)
        x = x.unflatten(1, (height, width)).unflatten(-1, (p, p, -1))  # (N, H/p, W/p, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (N, C, H, W)

    def _initialise(self) -> None:
        """Paper section 3.2: zero for whatever scales, gates or ends a branch, so that training starts calm."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # as if it were the linear layer that it is
        for name, parameter in self.named_parameters():
            if name.startswith(("y_embedder", "t_embedder")) and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            elif "adaLN_modulation" in name or name.startswith("final_layer.linear") or name == "x_embedder.proj.bias":
                nn.init.zeros_(parameter)
