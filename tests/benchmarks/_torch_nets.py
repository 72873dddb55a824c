"""Our networks written as a PyTorch user would, with submodules named as flax names ours, so that weights carry over.

2D and 3D by rank, channels first, NCHW or NCDHW. Only the benchmarks' PyTorch processes import this.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CONV = {2: nn.Conv2d, 3: nn.Conv3d}


class Net(nn.Module):
    """Numbers its submodules as flax does: Conv_0, Conv_1, ResBlock_0, ..."""

    def add(self, module: nn.Module, name: str) -> nn.Module:
        count = sum(key.rsplit("_", 1)[0] == name for key in self._modules)
        self.add_module(f"{name}_{count}", module)
        return module

    def conv(self, rank: int, inside: int, out: int, kernel: int = 3, stride=1) -> nn.Module:
        return self.add(CONV[rank](inside, out, kernel, stride, kernel // 2), "Conv")

    def norm(self, channels: int) -> nn.Module:
        groups = next(g for g in range(min(32, channels), 0, -1) if channels % g == 0)
        return self.add(nn.GroupNorm(groups, channels), "GroupNorm")

    def dense(self, inside: int, out: int) -> nn.Module:
        return self.add(nn.Linear(inside, out), "Dense")


class ResBlock(Net):
    def __init__(self, rank: int, inside: int, out: int, emb: int = 0):
        super().__init__()
        self.norm_in, self.conv_in = self.norm(inside), self.conv(rank, inside, out)
        self.norm_out = self.norm(out)
        self.film = self.dense(emb, 2 * out) if emb else None
        self.conv_out = self.conv(rank, out, out)
        self.skip = self.conv(rank, inside, out, 1) if inside != out else nn.Identity()

    def forward(self, x, emb=None):
        h = self.norm_out(self.conv_in(F.silu(self.norm_in(x))))
        if self.film is not None:
            film = self.film(F.silu(emb))
            scale, shift = film[(..., *(None,) * (x.ndim - 2))].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return self.skip(x) + self.conv_out(F.silu(h))


class Attention(Net):
    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm_in, self.qkv, self.out = self.norm(channels), self.dense(channels, 3 * channels), None
        self.out = self.dense(channels, channels)

    def forward(self, x):
        batch, channels, *_ = x.shape
        rows = self.norm_in(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(rows).reshape(batch, -1, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(rows.shape)
        return x + self.out(h).transpose(1, 2).reshape(x.shape)


class UNet(Net):
    def __init__(self, size, channels: int, width: int, mults, blocks: int, attention):
        super().__init__()
        rank, self.width = len(size), width
        self.time = nn.ModuleList([self.dense(width, 4 * width), self.dense(4 * width, 4 * width)])
        self.first = self.conv(rank, channels, width)
        self.down, self.up = [], []
        skips, inside = [width], width

        def block(inside: int, out: int, attend: bool):
            res = self.add(ResBlock(rank, inside, out, 4 * width), "ResBlock")
            return res, self.add(Attention(out), "Attention") if attend else nn.Identity()

        for level, (mult, attend) in enumerate(zip(mults, attention, strict=True)):
            out = width * mult
            if level:
                self.down.append(self.conv(rank, inside, out, stride=2))
                skips.append(out)
                inside = out
            for _ in range(blocks):
                self.down.append(block(inside, out, attend))
                skips.append(out)
                inside = out
        self.middle = [block(inside, inside, True), block(inside, inside, False)]
        for level, (mult, attend) in reversed(list(enumerate(zip(mults, attention, strict=True)))):
            out = width * mult
            for _ in range(blocks + 1):
                self.up.append(block(inside + skips.pop(), out, attend))
                inside = out
            if level:
                self.up.append(self.conv(rank, out, out))
        self.last = nn.ModuleList([self.norm(inside), self.conv(rank, inside, channels)])

    def forward(self, z, t):
        frequency = torch.exp(-np.log(10_000.0) * torch.arange(self.width // 2) / (self.width // 2))
        angle = 1000.0 * t[:, None] * frequency
        emb = self.time[1](F.silu(self.time[0](torch.cat([angle.sin(), angle.cos()], 1))))
        h = self.first(z)
        skips = [h]
        for part in self.down:
            h = part[1](part[0](h, emb)) if isinstance(part, tuple) else part(h)
            skips.append(h)
        for res, attend in self.middle:
            h = attend(res(h, emb))
        for part in self.up:
            if isinstance(part, tuple):
                h = part[1](part[0](torch.cat([h, skips.pop()], 1), emb))
            else:
                h = part(F.interpolate(h, scale_factor=2, mode="nearest"))
        return self.last[1](F.silu(self.last[0](h)))


def fold(x, factor: int):
    """Patches of positions into channels, in the channel order of `ldm.blocks.fold`."""
    batch, channels, *size = x.shape
    rank = len(size)
    x = x.reshape(batch, channels, *(n for s in size for n in (s // factor, factor)))
    x = x.permute(0, *range(3, 2 * rank + 2, 2), 1, *range(2, 2 * rank + 2, 2))
    return x.reshape(batch, -1, *(s // factor for s in size))


def unfold(x, factor: int):
    batch, _, *size = x.shape
    rank = len(size)
    x = x.reshape(batch, *(factor,) * rank, -1, *size)
    x = x.permute(0, rank + 1, *(axis for i in range(rank) for axis in (rank + 2 + i, 1 + i)))
    return x.reshape(batch, x.shape[1], *(s * factor for s in size))


class Encoder(Net):
    def __init__(self, rank: int, channels: int, widths, patch: int, latent: int):
        super().__init__()
        self.patch, inside = patch, widths[0]
        self.steps = [self.conv(rank, channels * patch**rank, inside)]
        for level, width in enumerate(widths):
            if level:
                self.steps.append(self.conv(rank, inside, width, stride=2))
            self.steps.append(self.add(ResBlock(rank, width, width), "ResBlock"))
            inside = width
        self.steps.append(self.add(ResBlock(rank, inside, inside), "ResBlock"))
        self.last = nn.ModuleList([self.norm(inside), self.conv(rank, inside, 2 * latent)])

    def forward(self, x):
        h = fold(x, self.patch)
        for step in self.steps:
            h = step(h)
        mu, logvar = self.last[1](F.silu(self.last[0](h))).chunk(2, 1)
        return mu, logvar.clamp(-30, 20)


class Decoder(Net):
    def __init__(self, rank: int, channels: int, widths, patch: int, latent: int):
        super().__init__()
        self.patch, inside = patch, widths[-1]
        self.steps = [self.conv(rank, latent, inside), self.add(ResBlock(rank, inside, inside), "ResBlock")]
        for level in reversed(range(len(widths))):
            self.steps.append(self.add(ResBlock(rank, widths[level], widths[level]), "ResBlock"))
            if level:
                self.steps += [nn.Upsample(scale_factor=2), self.conv(rank, widths[level], widths[level - 1])]
        self.last = nn.ModuleList([self.norm(widths[0]), self.conv(rank, widths[0], channels * patch**rank)])

    def forward(self, z):
        for step in self.steps:
            z = step(z)
        return unfold(self.last[1](F.silu(self.last[0](z))), self.patch)


class Autoencoder(nn.Module):
    def __init__(self, *settings):
        super().__init__()
        self.encoder, self.decoder = Encoder(*settings), Decoder(*settings)

    def forward(self, x):
        mu, logvar = self.encoder(x)
        return self.decoder(mu), mu, logvar


class Residual(Net):
    def __init__(self, rank: int, inside: int, out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            self.conv(rank, inside, out, stride=stride), self.norm(out), nn.ReLU(), self.conv(rank, out, out), self.norm(out)
        )  # fmt: skip
        same = inside == out and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(self.conv(rank, inside, out, 1, stride), self.norm(out))

    def forward(self, x):
        return F.relu(self.skip(x) + self.body(x))


class Grid(Net):
    """The detector's encoder of `detection.encoder`, for square images whose kept grid is at most 8 a side."""

    def __init__(self, size, widths, blocks, fold: int, squeeze: int, dim: int):
        super().__init__()
        rank, self.fold = len(size), fold
        self.steps = [self.conv(rank, fold**rank, widths[0]), self.norm(widths[0]), nn.ReLU()]
        inside, cells = widths[0], [n // fold for n in size]
        for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for i in range(count):
                stride = 2 if level and i == 0 else 1
                self.steps.append(self.add(Residual(rank, inside, width, stride), "_Residual"))
                inside, cells = width, [n // stride for n in cells]
        self.squeeze = self.conv(rank, inside, squeeze, 1)
        self.out = self.dense(inside + squeeze * int(np.prod(cells)), dim)

    def forward(self, x):
        h = fold(x, self.fold)
        for step in self.steps:
            h = step(h)
        mean = h.flatten(2).mean(2)
        kept = self.squeeze(h).flatten(2).transpose(1, 2).flatten(1)
        return self.out(torch.cat([mean, kept], 1))


def kernel(values: np.ndarray) -> torch.Tensor:
    """Flax's (*K, in, out) in PyTorch's order (out, in, *K)."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, (-1, -2), (0, 1))))


def pairs(net: nn.Module, prefix: str = "") -> dict[str, torch.nn.Parameter]:
    """Our names of a network's parameters: 'ResBlock_0/Conv_1/kernel' and so on."""
    found = {}
    for name, child in net.named_children():
        if isinstance(child, Net) and name not in ("encoder", "decoder"):
            found |= pairs(child, f"{prefix}{name}/")
        elif name in ("encoder", "decoder"):
            found |= pairs(child, f"{prefix}{name}/params/")
        elif name.startswith(("Conv_", "Dense_", "GroupNorm_")):
            key = "scale" if isinstance(child, nn.GroupNorm) else "kernel"
            found |= {f"{prefix}{name}/{key}": child.weight, f"{prefix}{name}/bias": child.bias}
    return found
