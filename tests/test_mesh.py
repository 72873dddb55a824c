"""The mesh: volumes split over devices give the same losses and gradients, and take less memory on each."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import layers, mesh
from ldm import autoencoder, reconstruction, unet


def tasks():
    """3D models: name -> (init, loss, batch of eight)."""
    shape = (16, 8, 8, 1)
    normal = np.random.default_rng(0).standard_normal
    coder = autoencoder.build(shape, widths=(4, 8), strides=(2,), patch=1, latent=2, blocks=1, attention=True)
    net = unet.UNet(width=8, mults=(1, 2), blocks=1, attention=(False, False))

    def denoising(params, batch, key):
        return ((net.apply(params, batch, jnp.full(len(batch), 0.3)) - jnp.sin(batch)) ** 2).mean(), {}

    aims = reconstruction.Aims("l1", 1e-4, False, 0.25, 0.0, None, 0.0, ())
    task = reconstruction.task(coder, aims, adversarial=False)
    return {
        "autoencoder": (task.init, task.loss, normal((8, *shape)).astype(np.float32)),
        "unet": (
            lambda key: net.init(key, jnp.zeros((1, 4, 4, 4, 2)), jnp.zeros(1)),
            denoising,
            normal((8, 4, 4, 4, 2)).astype(np.float32),
        ),
    }


def gradient(name, mesh_):
    """Compiled on this mesh: (loss, gradients) of the model, and what XLA says of the program."""
    init, loss, batch = tasks()[name]
    with jax.set_mesh(mesh_):
        params = jax.jit(lambda key: layers.init(init, key))(jax.random.key(0))
        # layers that start at zero would hide what comes before them
        params = jax.tree.map(lambda a: a + 0.1 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), params)
        shardings = mesh.shardings(params)
        fn = jax.jit(
            jax.value_and_grad(lambda p, x: loss(p, x, jax.random.key(1))[0]),
            out_shardings=(mesh.replicated(), shardings),
        )
        args = jax.device_put(params, shardings), mesh.put(batch)
        program = fn.lower(*args).compile()
        return jax.tree.map(np.asarray, program(*args)), program


@pytest.fixture
def native(monkeypatch):
    """The convolutions of accelerators, which also compile faster."""
    monkeypatch.setattr(layers.jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("depth", "kernel", "stride", "spatial", "split"),
    [
        (8, 3, 1, 8, True),  # slabs of one plane
        (8, 3, 2, 4, True),  # whose planes come out one each: XLA's own kernel gradient is wrong here
        (8, 3, 2, 8, False),  # too thin to halve
        (12, 5, 3, 2, True),
        (12, 5, 1, 4, True),
        (6, 3, 1, 4, False),  # 4 does not divide 6
        (8, 5, 1, 8, False),  # slabs of one plane, of which the neighbour needs two
    ],
)
def test_convolution_of_split_images(mesh_of, monkeypatch, backend, depth, kernel, stride, spatial, split):
    monkeypatch.setattr(layers.jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((8, depth, 4, 3, 2)), rng.standard_normal((kernel, 3, 3, 2, 3))
    x, w = x.astype(np.float32), w.astype(np.float32)
    strides = (stride, 1, 2)

    def loss(w, x):
        y = layers.conv(x, w, strides)
        return jnp.sin(y).sum(), y

    results = []
    for args in ((1, 1, 1), (8, 1, spatial)):
        with jax.set_mesh(mesh_of(*args)):
            fn = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
            results.append(jax.tree.map(np.asarray, fn(w, mesh.put(x))))
            assert ("ppermute" in str(jax.make_jaxpr(loss)(w, x))) == (split and args[2] > 1)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autoencoder", "unet"])
def test_volumes_split_over_devices_give_the_same(mesh_of, native, name):
    one, _ = gradient(name, mesh_of(1, 1))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(one))
    many, _ = gradient(name, mesh_of(8, 2, 2))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_split_volume_takes_its_share_of_memory(mesh_of, native):
    """Nothing is gathered whole."""
    results, memory, whole = [], [], []
    for devices, spatial in ((1, 1), (4, 4)):
        result, program = gradient("autoencoder", mesh_of(devices, 1, spatial))
        results.append(jax.tree.leaves(result))
        memory.append(program.memory_analysis().temp_size_in_bytes)
        whole.append(program.as_text().count("f32[8,16,8,8,"))
    assert memory[1] < 0.4 * memory[0], memory
    assert whole[0] > 0 and whole[1] == 0
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_put_splits_rows_and_images(mesh_of):
    with jax.set_mesh(mesh_of(8, 2, 2)):
        volumes, mask, names, odd = mesh.put(
            [np.zeros((8, 4, 6, 6, 1)), np.zeros((8, 3)), np.arange(8), np.zeros((8, 5, 4, 1))]
        )
        assert volumes.sharding.spec == jax.P(("data", "fsdp"), "spatial")
        assert volumes.addressable_shards[0].data.shape == (2, 2, 6, 6, 1)
        assert mask.sharding.spec == names.sharding.spec == odd.sharding.spec == jax.P(("data", "fsdp"))
        assert (mesh.size(), mesh.shares(), mesh.rows(8)) == (8, 4, slice(0, 8))
        with pytest.raises(ValueError, match="batch size 6 must be a multiple of the 4 devices that split a batch"):
            mesh.rows(6)


def test_a_stream_takes_batches_of_any_size(mesh_of):
    """Also those that the devices do not divide, as of audits and samples on a machine of another kind."""
    x = np.arange(10.0, dtype=np.float32)[:, None]
    for size in (1, 3, 4, 10):
        parts = [x[at : at + size] for at in range(0, 10, size)]
        batches = [(np.concatenate([p, np.repeat(p[-1:], size - len(p), 0)]), len(p)) for p in parts]
        with jax.set_mesh(mesh_of(8, 2, 2)):
            found = list(mesh.stream(jax.jit(lambda x: (2 * x, x[:, 0])), batches))
        assert [len(both[0]) for both in found] == [len(p) for p in parts]
        np.testing.assert_array_equal(np.concatenate([both[0] for both in found]), 2 * x)
        np.testing.assert_array_equal(np.concatenate([both[1] for both in found]), x[:, 0])


@pytest.mark.parametrize(("fsdp", "spatial"), [(3, 1), (1, 3), (4, 4), (0, 1), (1, 0)])
def test_a_mesh_that_does_not_fit_is_told(fsdp, spatial):
    with pytest.raises(ValueError, match=rf"mesh.fsdp={fsdp} times config.mesh.spatial={spatial} must divide the 8"):
        mesh.make(fsdp, spatial)


def test_what_is_missing_is_what_the_first_process_misses(monkeypatch, tmp_path):
    import main

    paths = [tmp_path / name for name in "abc"]
    paths[1].touch()
    assert main.absent(paths).tolist() == [0, 2]
    monkeypatch.setattr(mesh, "from_first", lambda mine: np.ones_like(mine))  # it looked before the file was written
    assert main.absent(paths).tolist() == [0, 1, 2]


def test_process_order():
    order = lambda process, shape: mesh.in_process_order(np.array(process).reshape(shape))
    assert order([0, 0, 1, 1], (2, 2, 1)) and order([0, 0, 1, 1], (2, 1, 2))
    assert not order([0, 1, 0, 1], (4, 1, 1)), "rows of two processes interleaved"
    assert not order([1, 1, 0, 0], (4, 1, 1)), "process 1's rows first"
    assert not order([0, 1, 0, 1], (2, 1, 2)), "an image shared by two processes"


def test_a_mesh_along_the_wires_is_put_back_in_process_order(monkeypatch):
    """A pod's topology may interleave its hosts; rows must not."""
    real = jax.devices()
    owner = {d: types.SimpleNamespace(process_index=i // 4, id=i) for i, d in enumerate(real)}
    zigzag = [owner[real[i]] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    monkeypatch.setattr(
        mesh.jax,
        "make_mesh",
        lambda shape, *_, devices, **__: types.SimpleNamespace(devices=np.array(zigzag).reshape(shape)),
    )
    monkeypatch.setattr(mesh, "Mesh", lambda devices, *_, **__: types.SimpleNamespace(devices=devices))
    made = mesh.make(2, 1, devices=zigzag)
    assert [d.id for d in made.devices.ravel()] == list(range(8))
    with pytest.raises(ValueError, match=r"mesh\.spatial=8: must divide the number of devices of each process"):
        mesh.make(1, 8, devices=zigzag)
