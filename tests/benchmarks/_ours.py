"""Our side of `training`, `inference` and `augmentation`: one case in one process, served to `_sides`.

A case names a network, its settings and a batch. With `file`, weights, inputs, loss and gradients are left there for the
other side to start from and to agree with.
"""

from launch import early

if __name__ == "__main__":
    early.settle()

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data import augment
from detection import detector
from launch import layers, loop, machine, mesh
from ldm import autoencoder, diffusion, samplers, unet
from tests.benchmarks import _sides

KL_WEIGHT, TEMPERATURE = 1e-4, 0.07


def unet_case(case: dict) -> tuple[loop.Task, tuple]:
    net = unet.UNet(**settings(case), dtype=case.get("dtype", "float32"))
    shape, draw = (*case["size"], case["channels"]), np.random.default_rng(0)
    z, target = (draw.standard_normal((case["batch"], *shape)).astype(np.float32) for _ in range(2))

    def loss(params: Any, batch: tuple, key: jax.Array) -> tuple[jax.Array, dict]:
        z, t, target = batch
        return ((net.apply(params, z, t) - target) ** 2).mean(), {}

    init = lambda key: net.init(key, jnp.zeros((1, *shape)), jnp.zeros(1))
    return loop.Task(init, loss), (z, draw.random(case["batch"]).astype(np.float32), target)


def autoencoder_case(case: dict) -> tuple[loop.Task, tuple]:
    """Our own task but for the noise, which comes with the batch so that the other side can add the same."""
    shape, draw = (*case["size"], case["channels"]), np.random.default_rng(0)
    model = autoencoder.build(shape, **settings(case), dtype=case.get("dtype", "float32"))

    def loss(params: Any, batch: tuple, key: jax.Array) -> tuple[jax.Array, dict]:
        x, eps = batch
        q = model.encode(params, x)
        x_hat = model.decode(params, q.mu + jnp.exp(0.5 * q.logvar) * eps)
        return jnp.abs(x_hat - x).mean() + KL_WEIGHT * autoencoder.kl(q).mean() / np.prod(shape), {}

    x = draw.standard_normal((case["batch"], *shape)).astype(np.float32)
    eps = draw.standard_normal((case["batch"], *model.latent_shape)).astype(np.float32)
    return loop.Task(model.init, loss), (x, eps)


def detector_case(case: dict) -> tuple[loop.Task, tuple]:
    shape, views = (*case["size"], case["channels"]), 2 * case["batch"]
    model = detector.build(shape, None, temperature=TEMPERATURE, flips=False, arch="grid", **settings(case))

    def loss(params: Any, batch: tuple, key: jax.Array) -> tuple[jax.Array, dict]:
        a, b = jnp.split(model.encoder.apply(params, batch[0]), 2)
        return detector.nt_xent(a, b, TEMPERATURE), {}

    x = np.random.default_rng(0).uniform(-1, 1, (views, *shape)).astype(np.float32)
    return loop.Task(lambda key: model.encoder.init(key, jnp.zeros((1, *shape))), loss), (x,)


CASES = {"unet": unet_case, "autoencoder": autoencoder_case, "detector": detector_case}


def settings(case: dict) -> dict:
    """The network's own settings; lists of JSON become tuples."""
    tuples = lambda v: tuple(map(tuples, v)) if isinstance(v, list) else v
    return {k: tuples(v) for k, v in case["settings"].items()}


def parameters(init: Callable) -> Any:
    """Parameters as after some training: none of them is zero, so that every gradient is alive."""
    flat, tree = jax.tree.flatten(layers.init(init, jax.random.key(0)))
    draw = np.random.default_rng(1)
    return jax.tree.unflatten(tree, [p + 0.02 * draw.standard_normal(p.shape).astype(np.float32) for p in flat])


def train(case: dict) -> tuple[dict, Callable]:
    """One optimiser step of the training loop, on a batch that stays on the devices."""
    task, host = CASES[case["net"]](case)
    params, batch = parameters(task.init), mesh.put(host)
    if case.get("file"):
        gradient = jax.jit(jax.value_and_grad(lambda p, b: task.loss(p, b, None)[0]))
        loss, grads = gradient(params, jax.tree.map(lambda x: x[: _sides.ALIKE], host))
        save(case["file"], params, host, loss, grads)
    tx = loop.optimiser(steps=10**6, rate=1e-4)
    state = jax.eval_shape(functools.partial(loop.create, task=task, tx=tx, ema=(), select=False), jax.random.key(0))
    shardings = mesh.shardings(state)
    state = jax.device_put(loop.State(jnp.int32(0), params, tx.init(params), {}, (), jnp.float32(0)), shardings)
    one = functools.partial(loop.train_step, task=task, tx=tx, key=jax.random.key(2))
    step = jax.jit(one, donate_argnums=0, out_shardings=(shardings, mesh.replicated()))
    step = loop.ahead(step, state, batch).result()
    stats = step.memory_analysis()
    said = {"parameters": sum(p.size for p in jax.tree.leaves(params)), "devices": mesh.size()}
    said["working memory MiB a device"] = round(stats.temp_size_in_bytes / 2**20) if stats else None

    def once() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    return said, once


def save(path: str, params: Any, batch: tuple, loss: jax.Array, grads: Any) -> None:
    named = {}
    for kind, tree in (("weight", params), ("gradient", grads)):
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            *path_, last = (key.key for key in keys)
            name = "/".join((*path_, "kernel" if last == "zero" else last))
            named[f"{kind}:{name.removeprefix('params/')}"] = np.asarray(leaf)
    np.savez(path, loss=np.asarray(loss), **{f"batch{i}": x for i, x in enumerate(batch)}, **named)


def sample(case: dict) -> tuple[dict, Callable]:
    """`batch` latents by `steps` steps of DDIM, as `ldm.sampler` draws them."""
    net, shape = unet.UNet(**settings(case)), (*case["size"], case["channels"])
    apply = lambda params, z, t, key: net.apply(params, z, t)
    denoiser = diffusion.denoiser(apply, diffusion.schedule("linear", 1000), "eps")
    params = parameters(lambda key: net.init(key, jnp.zeros((1, *shape)), jnp.zeros(1)))

    @jax.jit
    def draw(params: Any, numbers: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(numbers)
        return samplers.sample(denoiser, params, keys, shape, sampler="ddim", steps=case["steps"])

    numbers = mesh.put(np.arange(case["batch"], dtype=np.int32))
    return {"devices": mesh.size()}, lambda: jax.block_until_ready(draw(params, numbers))


def embed(case: dict) -> tuple[dict, Callable]:
    """Embeddings of `batch` images by the detector's network."""
    shape = (*case["size"], case["channels"])
    model = detector.build(shape, None, temperature=TEMPERATURE, flips=False, arch="grid", **settings(case))
    params = parameters(lambda key: model.encoder.init(key, jnp.zeros((1, *shape))))
    apply = jax.jit(model.encoder.apply)
    x = mesh.put(np.random.default_rng(0).uniform(-1, 1, (case["batch"], *shape)).astype(np.float32))
    return {"devices": mesh.size()}, lambda: jax.block_until_ready(apply(params, x))


def augmented(case: dict) -> tuple[dict, Callable]:
    """One distorted view of each image of a batch, by the case's distortions."""
    distort = jax.jit(functools.partial(augment.augment, **case["distortions"]))
    x = mesh.put(np.random.default_rng(0).uniform(-1, 1, (case["batch"], *case["size"], case["channels"])).astype("f4"))
    return {"devices": mesh.size()}, lambda: jax.block_until_ready(distort(jax.random.key(0), x))


TASKS = {"train": train, "sample": sample, "embed": embed, "augment": augmented}


def start(case: dict) -> tuple[dict, Callable]:
    if jax.config.jax_num_cpu_devices < 1:
        # a UNet takes latents of images four times as large
        pixels = int(np.prod(case["size"])) * (4 ** len(case["size"]) if case.get("net") == "unet" else 1)
        if machine.use_cores([case["batch"]], pixels):
            machine.keep_memory()
    jax.config.update("jax_compilation_cache_dir", str(machine.cache_folder() / "xla"))
    mesh_ = mesh.make(1)
    with jax.set_mesh(mesh_):
        said, once = TASKS[case["task"]](case)

    def within() -> None:
        with jax.set_mesh(mesh_):
            once()

    return said, within


if __name__ == "__main__":
    early.loaded()
    _sides.serve(start)
