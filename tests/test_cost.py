"""What things cost, against closed forms, XLA's own counts, and arithmetic on meshes."""

import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import cost, layers, loop, mesh
from tests.conftest import ROOT

B, D, F = 8, 256, 512
F32 = 4
rows = jax.ShapeDtypeStruct((B, D), jnp.float32)


def dense(zero_after=False):
    """A linear map and a squared error: 2 B D F forward; backward the same again for the kernel alone."""

    def loss(params, x, key):
        return ((x @ params["kernel"]) ** 2).mean(), {}

    return loop.Task(lambda key: {"kernel": jnp.zeros((D, F))}, loss)


def traced(fn, *shapes):
    return jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr


def test_a_dense_layer_by_hand():
    found = cost.of(dense(), rows, tx=optax.adam(1e-3), ema=(0.9, 0.99))
    assert found.parameters == D * F
    assert found.flops == 2 * (2 * B * D * F)
    assert found.weights == found.gradients == D * F * F32
    assert found.optimiser == 2 * D * F * F32 + F32  # two moments and a count
    assert found.averages == 2 * D * F * F32
    assert found.batch == 3 * B * D * F32
    assert found.communication == 0
    assert B * F * F32 <= found.activations <= 5 * B * F * F32
    kept = cost.of(dense(), rows, tx=optax.sgd(1.0), select=True)
    assert kept.averages == D * F * F32 and kept.optimiser == 0
    assert found.gathered == 0
    assert found.memory == sum([found.weights, found.gradients, found.optimiser, found.averages]) + (
        found.activations + found.batch
    )


def test_accumulated_parts_keep_activations_of_one():
    whole, parts = (cost.of(dense(), rows, tx=optax.sgd(1.0), accumulate=n) for n in (1, 4))
    assert parts.activations == whole.activations // 4 and parts.gradients == 2 * whole.gradients
    assert (parts.flops, parts.batch) == (whole.flops, whole.batch)
    one, two = (cost.of(dense(), rows, tx=optax.sgd(1.0), accumulate=n, devices=4) for n in (1, 2))
    assert two.communication == 2 * one.communication > 0
    with pytest.raises(
        ValueError, match="a batch of 8 must be a multiple of the 4 devices that split a batch times its 4"
    ):
        cost.of(dense(), rows, tx=optax.sgd(1.0), accumulate=4, devices=4)


def test_a_batch_is_prepared_whole_before_its_parts():
    """As by a frozen encoder: through 64 times as many numbers, without a gradient."""
    wide = 64 * D
    prepare = lambda x, key: jnp.tanh(x @ jnp.ones((D, wide)))[:, :D]
    plain, prepared = (cost.of(dense(), rows, tx=optax.sgd(1.0), prepare=how, accumulate=4) for how in (None, prepare))
    assert prepared.flops == plain.flops + 2 * B * D * wide
    assert B * wide * F32 <= prepared.activations <= 3 * B * wide * F32
    assert prepared.batch == plain.batch + B * D * F32


@pytest.mark.parametrize(("size", "strides"), [((16, 16), 1), ((16, 16), 2), ((8, 8, 8), 1)])
def test_a_convolution_by_hand(size, strides):
    rank, c, f = len(size), 4, 6
    conv = lambda x, k: layers.conv(x, k, (strides,) * rank)
    with layers.lowered_for("accelerator"):
        jaxpr = traced(conv, (2, *size, c), (*(3,) * rank, c, f))
    out = 2 * np.prod([n // strides for n in size]) * f
    assert cost.flops(jaxpr) == 2 * out * 3**rank * c
    assert cost.borders(jaxpr) == 2 * (2 * np.prod(size[1:]) * c) * F32  # two planes of the image
    here = traced(conv, (2, *size, c), (*(3,) * rank, c, f))  # four planes at a time: six products for twelve
    assert cost.flops(here) == pytest.approx(cost.flops(jaxpr) * (1 / 2 if rank == 3 else 1))


def test_the_gradient_of_a_convolution_counts_no_zeros():
    """Forward, of the image and of the kernel: as many each, whatever the strides."""
    for strides in (1, 2):
        conv = lambda x, k, s=strides: (layers.conv(x, k, (s, s)) ** 2).sum()
        forward = traced(conv, (2, 16, 16, 4), (3, 3, 4, 6))
        both = traced(jax.grad(conv, argnums=(0, 1)), (2, 16, 16, 4), (3, 3, 4, 6))
        assert 2.5 <= cost.flops(both) / cost.flops(forward) <= 3.5


@given(st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_loops_count_as_often_as_they_run(length, inner):
    def fn(x):
        once = lambda x, _: (jax.lax.scan(lambda y, _: (y @ x, None), x, None, length=inner)[0], None)
        return jax.lax.scan(once, x, None, length=length)[0]

    assert cost.flops(traced(jax.jit(fn), (4, 4))) == length * inner * 2 * 4**3


def test_the_peak_is_what_is_alive_at_once():
    mib = 2**20
    big = (mib // F32,)
    assert cost.peak(traced(lambda x: (x + 1) * 2 + 3, big)) == 2 * mib  # one made from one
    kept = traced(lambda x: sum([jnp.sin(x * i) for i in range(1, 5)]), big)
    assert 2 * mib <= cost.peak(kept) <= 6 * mib
    assert cost.peak(traced(lambda x: x.reshape(2, -1) + 1, big)) == mib  # a view is no copy


def test_against_xla():
    """FLOPs as its own analysis counts them; memory from above, and not by far."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features in (16, 32, 16):
                x = nn.silu(layers.GroupNorm()(layers.Conv(features)(x)))
            return layers.Conv(1)(x)

    net, image = Net(), jax.ShapeDtypeStruct((16, 32, 32, 1), jnp.float32)
    task = loop.Task(
        lambda key: net.init(key, jnp.zeros((1, 32, 32, 1))),
        lambda p, x, key: (((net.apply(p, x) - x) ** 2).mean(), {}),
    )
    found = cost.of(task, image, tx=optax.sgd(1.0))
    params = jax.eval_shape(lambda: layers.init(task.init, jax.random.key(0)))
    step = jax.jit(jax.grad(lambda p, x: task.loss(p, x, None)[0])).lower(params, image)
    assert 0.8 <= found.flops / step.cost_analysis()["flops"] <= 1.1
    working = step.compile().memory_analysis().temp_size_in_bytes
    assert 0.8 <= found.activations / working <= 4


def test_what_a_mesh_sends_and_holds():
    whole = D * F * F32
    tx = optax.adam(1e-3)
    of = lambda **layout: cost.of(dense(), rows, tx=tx, **layout)
    one, data, fsdp, both = of(), of(devices=4), of(devices=4, fsdp=4), of(devices=8, fsdp=4)
    assert data.communication == 2 * 3 / 4 * whole  # a ring's sum over four
    assert fsdp.communication == 3 * 3 / 4 * whole  # gathered twice, scattered once
    assert both.communication == 3 * 3 / 4 * whole + 2 * 1 / 2 * whole / 4
    assert one.flops == data.flops == fsdp.flops == both.flops
    assert one.weights == data.weights == 4 * fsdp.weights == 4 * both.weights
    assert data.batch == one.batch / 4 and data.activations <= one.activations / 3
    a100 = cost.ACCELERATORS["A100"]
    assert cost.seconds(one, a100, 0.5) == one.flops / (a100.flops * 0.5)
    assert cost.seconds(data, a100, 0.5) == data.communication / a100.links  # this small, the wires decide
    for wrong, said in (
        ({"devices": 4, "fsdp": 3}, "must divide"),
        ({"devices": 3}, "a batch of 8 must be a multiple"),
    ):
        with pytest.raises(ValueError, match=said):
            of(**wrong)


def test_each_accumulated_part_is_summed_over_the_devices(mesh_of):
    """As the compiled step does, whose loop over the parts holds the sum."""
    task = loop.Task(lambda key: {"kernel": jnp.ones((D, F))}, dense().loss)
    with jax.set_mesh(mesh_of(4, 1)):
        state = loop.create(jax.random.key(0), task=task, tx=optax.sgd(1.0), ema=(), select=False)
        step = lambda state, batch: loop.train_step(
            state, batch, task=task, tx=optax.sgd(1.0), key=jax.random.key(0), accumulate=2
        )
        text = jax.jit(step).lower(state, mesh.put(np.ones((B, D), np.float32))).compile().as_text()
    inside = [block for block in text.split("\n\n") if "all-reduce" in block and f"f32[{D},{F}]" in block]
    assert inside and all("ENTRY" not in block for block in inside)


def test_products_of_16_bits_are_counted_by_themselves():
    def mixed(x, y):
        return (x @ y).sum() + (x.astype(jnp.bfloat16) @ y.astype(jnp.bfloat16)).sum()

    jaxpr = traced(mixed, (B, D), (D, F))
    assert cost.flops(jaxpr) == 2 * cost.flops(jaxpr, sixteen=True) == 2 * (2 * B * D * F)
    half = cost.of(dense(), rows, tx=optax.sgd(1.0))._replace(flops16=0.0)
    for name, gain in (("A100", 2), ("H100", 989 / 494), ("RTX 4090", 2), ("TPU v5e", 1)):
        kind = cost.ACCELERATORS[name]
        all16 = half._replace(flops16=half.flops)
        assert cost.seconds(half, kind, 0.3) == pytest.approx(gain * cost.seconds(all16, kind, 0.3))


def test_weights_are_gathered_where_they_are_shared():
    one, shared = (cost.of(dense(), rows, tx=optax.sgd(1.0), devices=4, fsdp=fsdp) for fsdp in (1, 4))
    assert one.gathered == 0 and shared.weights + shared.gathered == one.weights == D * F * F32
    weights = {"kernel": jax.ShapeDtypeStruct((D, D), jnp.float32)}

    def draw(weights, x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ weights["kernel"]), None), x, None, length=7)[0]

    whole, parts = (cost.drawing(draw, weights, rows, devices=4, fsdp=fsdp) for fsdp in (1, 4))
    assert (whole.weights, whole.gathered, whole.communication) == (D * D * F32, 0, 0)
    assert 8 * cost.drawing(draw, weights, rows, devices=3).flops == 9 * whole.flops, "filled up, as when it is run"
    assert parts.weights == whole.weights / 4 and parts.gathered == 3 * parts.weights
    assert parts.communication == 7 * parts.gathered and parts.flops == whole.flops


def test_wires_between_nodes_are_slower():
    a100 = cost.ACCELERATORS["A100"]
    near, far = (
        cost.Cost(n, 1, 1.0, 0.0, 1, 0, 1, 1, 1, 1, 1, communication=10**9) for n in (a100.node, 2 * a100.node)
    )
    assert cost.seconds(near, a100, 0.3) == 1e9 / a100.links < cost.seconds(far, a100, 0.3) == 1e9 / a100.between
    told = cost.table({"train": cost.Stage(far, 1, "key")}, 0.3)
    assert "2 nodes, 200 GB/s out of each" in told
    assert "nodes" not in cost.table({"train": cost.Stage(near, 1, "key")}, 0.3)


@pytest.mark.slow
def test_a_dry_run_plans_for_one_accelerator_where_there_is_none(tmp_path):
    command = [sys.executable, "main.py", "--config=configs/brain.py:tiny", "--mode=train", f"--workdir={tmp_path}"]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "XLA_FLAGS": ""}
    done = subprocess.run([*command, "--config.dry_run=True"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(s["devices"] == 1 and s["communication"] == 0 for s in found.values())
    assert "GB of a device's 24: fits" in done.stdout


@pytest.mark.slow
def test_a_dry_run_writes_nothing(tmp_path):
    overrides = ["--config.mesh.fsdp=4", "--config.plan.devices=8", "--config.augment.diffusion.flip=0.5"]
    command = [sys.executable, "main.py", "--config=configs/brain.py:tiny", "--mode=train", *overrides]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'none'}", "--config.dry_run=True"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "none").exists()
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == ["autoencoder", "diffusion", "looks", "detector", "sampling"]
    assert found["looks"]["steps"] == 2  # eight steps, and one after every four
    assert all(s["devices"] == 8 and s["flops"] > 0 and s["memory"] > 0 for s in found.values())
    assert found["sampling"]["steps"] == 2  # twelve samples, eight at a time
    assert all(name in done.stdout for name in cost.ACCELERATORS) and "DOES NOT FIT" not in done.stdout
