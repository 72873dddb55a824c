"""The PyTorch stacks' side of `training`, `inference` and `augmentation`; runs in the Python that has `requirements-bench.txt`."""

from collections.abc import Callable

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks import _sides
from tests.benchmarks import _torch_nets as nets

KL_WEIGHT, TEMPERATURE = 1e-4, 0.07
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def network(case: dict) -> torch.nn.Module:
    """Our network in PyTorch, or the peer's own UNet of the same widths, depths and attention."""
    own, size, channels = case["settings"], case["size"], case["channels"]
    if case["peer"] == "torch":
        if case["net"] == "unet":
            return nets.UNet(size, channels, own["width"], own["mults"], own["blocks"], own["attention"])
        if case["net"] == "autoencoder":
            return nets.Autoencoder(len(size), channels, own["widths"], own["patch"], own["latent"])
        return nets.Grid(size, **own)
    widths, heads = [own["width"] * m for m in own["mults"]], 4
    if case["peer"] == "monai":
        from monai.networks.nets import DiffusionModelUNet

        return DiffusionModelUNet(
            spatial_dims=len(size),
            in_channels=channels,
            out_channels=channels,
            num_res_blocks=own["blocks"],
            channels=widths,
            attention_levels=own["attention"],
            norm_num_groups=32,
            num_head_channels=[w // heads for w in widths],
        )
    from diffusers import UNet2DModel

    kind = lambda way: tuple(f"{'Attn' if a else ''}{way}Block2D" for a in own["attention"])
    return UNet2DModel(
        sample_size=size[0],
        in_channels=channels,
        out_channels=channels,
        layers_per_block=own["blocks"],
        block_out_channels=widths,
        down_block_types=kind("Down"),
        up_block_types=kind("Up")[::-1],
        attention_head_dim=widths[-1] // heads,
    )


def denoise(net: torch.nn.Module, case: dict, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """One evaluation of a UNet at times t in [0, 1]; the peers' own take whole steps and may wrap what they return."""
    out = net(z, t if case["peer"] == "torch" else (1000 * t).long())
    return out if torch.is_tensor(out) else out.sample


def loss_of(net: torch.nn.Module, case: dict, batch: list[torch.Tensor]) -> torch.Tensor:
    if case["net"] == "unet":
        z, t, target = batch
        return ((denoise(net, case, z, t) - target) ** 2).mean()
    if case["net"] == "autoencoder":
        x, eps = batch
        mu, logvar = net.encoder(x)
        x_hat = net.decoder(mu + torch.exp(0.5 * logvar) * eps)
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum() / len(x)
        return (x_hat - x).abs().mean() + KL_WEIGHT * kl / x[0].numel()
    z = torch.nn.functional.normalize(net(batch[0]), dim=1)
    n = len(z)
    sim = (z @ z.T / TEMPERATURE).masked_fill(torch.eye(n, dtype=bool, device=z.device), -torch.inf)
    return torch.nn.functional.cross_entropy(sim, (torch.arange(n, device=z.device) + n // 2) % n)


def agree(net: torch.nn.Module, case: dict, saved: dict, batch: list[torch.Tensor]) -> dict:
    """Starts from our weights; relative differences of the loss, and of each parameter's gradient in the maximum norm.

    A gradient that is zero in exact arithmetic (a bias before a norm of one channel a group) is rounding noise on both
    sides: none is taken for smaller than 1/100 of the network's largest.
    """
    named = nets.pairs(net)
    with torch.no_grad():
        for name, parameter in named.items():
            value = saved[f"weight:{name}"]
            parameter.copy_(torch.from_numpy(value) if value.ndim == 1 else nets.kernel(value))
    left = {key.removeprefix("weight:") for key in saved if key.startswith("weight:")} - set(named)
    if left or len(named) != len(list(net.parameters())):
        raise ValueError(f"the two networks differ in {sorted(left) or 'PyTorch parameters without a name'}")
    loss = loss_of(net, case, [x[: _sides.ALIKE] for x in batch])
    loss.backward()
    floor = 1e-2 * max(float(np.abs(saved[f"gradient:{name}"]).max()) for name in named)
    worst = 0.0
    for name, parameter in named.items():
        ours = saved[f"gradient:{name}"]
        ours = torch.from_numpy(ours) if ours.ndim == 1 else nets.kernel(ours)
        size = max(float(ours.abs().max()), floor)
        worst = max(worst, float((parameter.grad.cpu() - ours).abs().max()) / size)
    return {"loss differs by": float(abs(loss.item() / saved["loss"] - 1)), "gradient differs by": worst}


def train(case: dict) -> tuple[dict, Callable]:
    saved = dict(np.load(case["file"]))
    batch = [torch.from_numpy(saved[f"batch{i}"]) for i in range(sum(k.startswith("batch") for k in saved))]
    batch = [x.movedim(-1, 1).contiguous().to(DEVICE) if x.ndim > 2 else x.to(DEVICE) for x in batch]
    net = network(case).to(DEVICE)
    said = {"parameters": sum(p.numel() for p in net.parameters()), "threads": torch.get_num_threads()}
    if case["peer"] == "torch" and case.get("dtype", "float32") == "float32":
        said |= agree(net, case, saved, batch)
    with FlopCounterMode(display=False) as counter:
        loss_of(net, case, batch).backward()
    said["GFLOP"] = round(counter.get_total_flops() / 1e9, 2)
    run = torch.compile(net) if case.get("compile") else net
    adam = torch.optim.Adam(net.parameters(), lr=1e-4)
    low = case.get("dtype") == "bfloat16"

    def once() -> None:
        adam.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=low):
            loss = loss_of(run, case, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        loss.item()

    return said, once


@torch.no_grad()
def sample(case: dict) -> tuple[dict, Callable]:
    """DDIM with eta 0: by diffusers' scheduler, whichever network is sampled."""
    from diffusers import DDIMScheduler

    net = network(case).to(DEVICE).eval()
    scheduler = DDIMScheduler(1000, clip_sample=False)
    scheduler.set_timesteps(case["steps"])
    shape = (case["batch"], case["channels"], *case["size"])

    @torch.no_grad()
    def once() -> None:
        z = torch.randn(shape, device=DEVICE)
        for t in scheduler.timesteps:
            z = scheduler.step(denoise(net, case, z, t.expand(len(z)) / 1000), t, z).prev_sample
        z.cpu()

    return {"threads": torch.get_num_threads()}, once


def embed(case: dict) -> tuple[dict, Callable]:
    net = network(case).to(DEVICE).eval()
    x = torch.rand((case["batch"], case["channels"], *case["size"]), device=DEVICE)

    @torch.no_grad()
    def once() -> None:
        net(x).cpu()

    return {"threads": torch.get_num_threads()}, once


def augment(case: dict) -> tuple[dict, Callable]:
    """MONAI's transforms of the same kinds and probabilities, which take one image at a time."""
    from monai import transforms as t

    own, rank = case["distortions"], len(case["size"])
    angle = np.deg2rad(own["rotate"])
    view = t.Compose(
        [
            t.RandFlip(own["flip"], rank - 1),
            t.RandAffine(
                own["rotate_p"],
                rotate_range=(angle,) * (1 if rank == 2 else 3),
                translate_range=[own["shift"] * n for n in case["size"]],
                scale_range=(own["scale"],) * rank,
                padding_mode="border",
            ),
            t.RandAdjustContrast(0.5, (float(np.exp(-own["gamma"])), float(np.exp(own["gamma"])))),
            t.RandBiasField(prob=0.5, degree=2, coeff_range=(0.0, own["bias"])),
            t.RandGaussianSmooth(*((0.01, own["blur"]),) * 3, prob=0.5),
            t.RandGaussianNoise(0.5, std=own["noise"]),
        ]
    )
    x = 2 * torch.rand((case["batch"], case["channels"], *case["size"])) - 1

    @torch.no_grad()
    def once() -> None:
        torch.stack([torch.as_tensor(view(image)) for image in x])

    return {"threads": torch.get_num_threads()}, once


TASKS = {"train": train, "sample": sample, "embed": embed, "augment": augment}

if __name__ == "__main__":
    _sides.serve(lambda case: TASKS[case["task"]](case))
