"""Vision and diffusion transformers for small images, written plainly."""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _patch(image_size: int) -> int:
    """Return the largest patch up to 16 pixels that cuts the image into 7 or more a side."""
    fits = (p for p in range(16, 0, -1) if image_size % p == 0 and image_size // p >= 7)
    return next(fits)


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, T, D] (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        qkv = self.qkv(tokens).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, heads, D / heads]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, D / heads]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def _mlp(width: int, act: nn.Module) -> nn.Sequential:
    fc1, fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    return nn.Sequential(OrderedDict[str, nn.Module](fc1=fc1, act=act, fc2=fc2))


class ViTBlock(nn.Module):
    """Attention, then an MLP, each after a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _mlp(width, nn.GELU())

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class ViT(nn.Module):
    """Vision transformer with a class token (Dosovitskiy et al. 2021); tiny: 12 x 192, 3 heads.

    Parameters carry timm's names, so that weights for `vit_tiny_patch16_224` fit at 224 pixels.
    """

    def __init__(self, classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        width, patch = 192, _patch(image_size)
        project = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.patch_embed = nn.Sequential(OrderedDict[str, nn.Module](proj=project))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(ViTBlock(width, heads=3) for _ in range(12)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        _init_linear(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to outputs [B, classes]."""
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2)  # [B, T, D]
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), tokens], dim=1)
        tokens = self.norm(self.blocks(tokens + self.pos_embed))
        return self.head(tokens[:, 0])


def _init_linear(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def _waves(positions: Tensor, width: int) -> Tensor:
    """Return sines and cosines of positions [N] at width / 2 frequencies each: [N, width]."""
    steps = torch.arange(width // 2, device=positions.device) / (width // 2)
    angles = positions.float()[:, None] * 10000.0**-steps  # [N, width / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class DiTBlock(nn.Module):
    """A ViT block whose norms are scaled and shifted, and branches gated, by the condition.

    Peebles and Xie 2023, figure 3 (adaLN-Zero): all six vectors start at zero, the gates with them,
    so that every block starts as the identity.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = _mlp(width, nn.GELU(approximate="tanh"))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Map tokens [B, T, D], given condition [B, D], to [B, T, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)  # each [B, 1, D]
        )
        tokens = tokens + gate1 * self.attn(self.norm1(tokens) * (1 + scale1) + shift1)
        return tokens + gate2 * self.mlp(self.norm2(tokens) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Class-conditional diffusion transformer (Peebles and Xie 2023), here 6 x 128 with 4 heads.

    Patches are 4 pixels a side, or 2 or 1 where 4 do not divide the image.

    `labels` may also be `classes`, one past the last: no class, for classifier-free guidance. The
    output starts at zero (the last layer is zero) and predicts the noise alone, no variance.
    """

    def __init__(self, classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        width, self.patch = 128, math.gcd(image_size, 4)
        self.side = image_size // self.patch
        self.patch_embed = nn.Conv2d(in_channels, width, self.patch, stride=self.patch)
        grid = torch.arange(self.side)
        across, down = _waves(grid, width // 2), _waves(grid, width // 2)  # [side, D / 2]
        places = torch.cat(
            [down.repeat_interleave(self.side, 0), across.repeat(self.side, 1)], dim=1
        )
        self.register_buffer("places", places)  # [T, D], fixed
        self.time_embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label_embed = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads=4) for _ in range(6))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, self.patch**2 * in_channels)
        _init_linear(self)
        nn.init.normal_(self.label_embed.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if "modulation" in name or name.startswith("head"):
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Predict the noise in images [B, C, H, W] at timesteps [B] for labels [B]."""
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2) + self.places  # [B, T, D]
        times = _waves(timesteps, 256).to(tokens.dtype)
        condition = self.time_embed(times) + self.label_embed(labels)  # [B, D]
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        patches = self.head(self.norm(tokens) * (1 + scale) + shift)  # [B, T, patch * patch * C]
        pixels = patches.unflatten(2, (self.patch, self.patch, -1))
        pixels = pixels.unflatten(1, (self.side, self.side))  # [B, rows, cols, down, across, C]
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(images.shape)
