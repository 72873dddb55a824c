"""The training loop: exact resume, device-count invariance, one compile, failures told."""

import signal
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import data
from launch import checkpoint, layers, log, loop, mesh

X = np.random.default_rng(0).standard_normal((64, 6, 6, 8)).astype(np.float32)


class Net(layers.nn.Module):
    @layers.nn.compact
    def __call__(self, x):
        h = layers.GroupNorm()(layers.Conv(128)(x))
        return layers.Dense(8)(jax.nn.silu(layers.Conv(128)(h)))


def loss(params, batch, key):
    noise = jax.random.normal(key, batch.shape)
    error = Net().apply(params, batch + 0.1 * noise) - batch
    return (error**2).mean(), {"first": error[0].mean()}


TASK = loop.Task(lambda key: Net().init(key, jnp.zeros((1, *X.shape[1:]))), loss)
TX = loop.optimiser(steps=12, rate=1e-2, warmup=2, decay_to=0.1)


def batches(start):
    step = start
    while True:
        yield X[np.random.default_rng(step).permutation(64)[:16]][mesh.rows(16)]
        step += 1


def run(folder, steps=12, **kwargs):
    settings = dict(ema=(0.9, 0.99), save_every=4, eval_every=3, log_every=2, key=jax.random.key(0))
    held_out = lambda: [mesh.put(X[:8])]
    return loop.fit(
        "toy", kwargs.pop("task", TASK), kwargs.pop("batches", batches), folder=folder, steps=steps, tx=TX,
        held_out=held_out, select=True, **{**settings, **kwargs},
    )  # fmt: skip


def assert_same(a, b, exact=True):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if exact:
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        else:
            np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-4, atol=2e-5)


class Killed(Exception):
    pass


def interrupted(at):
    def feed(start):
        for step, batch in enumerate(batches(start), start):
            if step == at:
                raise Killed
            yield batch

    return feed


@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_killed_run_ends_in_the_same_bits(tmp_path, at):
    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", batches=interrupted(at))
    assert_same(whole, run(tmp_path / "killed"))
    steps = [log.json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "loss" in s] == [2, 4, 6, 8, 10, 12]


def test_a_finished_run_is_only_restored(tmp_path):
    state = run(tmp_path)
    assert_same(state, run(tmp_path, batches=interrupted(0)))


def test_longer_training_goes_on(tmp_path):
    run(tmp_path / "grown", steps=6)
    assert_same(run(tmp_path / "whole"), run(tmp_path / "grown"))


@pytest.mark.parametrize(("devices", "fsdp"), [(2, 1), (4, 4), (8, 1), (8, 2)])
def test_any_number_of_devices_agrees(tmp_path, mesh_of, devices, fsdp):
    with jax.set_mesh(mesh_of(1, 1)):
        one = run(tmp_path / "one")
    with jax.set_mesh(mesh_of(devices, fsdp)):
        many = run(tmp_path / "many", steps=5)
        sharded = many.params["params"]["Conv_1"]["kernel"].sharding.spec
        assert sharded == (jax.P(None, None, "fsdp") if fsdp > 1 else jax.P())
    with jax.set_mesh(mesh_of(4, 2)):  # and a checkpoint goes on under yet another mesh
        many = run(tmp_path / "many")
    assert_same(one, many, exact=False)


def test_no_batch_stays_on_the_devices(tmp_path, monkeypatch):
    """The first one, of which the compiler is told, least of all."""
    on_devices, put = [], mesh.put

    def tracked(batch):
        batch = put(batch)
        on_devices.append(weakref.ref(batch))
        return batch

    def batches(start):
        for _ in range(start, 8):
            alive.append(sum(ref() is not None for ref in on_devices))
            yield np.ones((8, 4), np.float32)

    alive = []
    monkeypatch.setattr(mesh, "put", tracked)
    task = loop.Task(lambda key: {"kernel": jnp.ones((4, 4))}, lambda p, x, key: (((x @ p["kernel"]) ** 2).mean(), {}))
    tx, key = loop.optimiser(steps=8, rate=1e-3), jax.random.key(0)
    loop.fit("held", task, batches, folder=tmp_path, steps=8, tx=tx, key=key)
    assert len(alive) == 8 and max(alive) <= 1, alive  # that of the last step


def test_one_compile_for_each_function(tmp_path):
    with _Compiles() as compiled:
        run(tmp_path)
    assert compiled.count("train_step") == compiled.count("create") == 1, compiled.names
    assert compiled.count("keep_best") <= 1, compiled.names  # compiled by an earlier test, perhaps


class _Compiles:
    """Names of what JAX compiles in the meantime, in whatever thread, from its log."""

    def __enter__(self):
        import logging

        self.names = []
        self.handler = logging.Handler()
        self.handler.emit = lambda record: self.names.append(record.getMessage()[:60])
        self.logger = logging.getLogger("jax._src.interpreters.pxla")
        self.logger.addHandler(self.handler)
        jax.config.update("jax_log_compiles", True)  # jax.log_compiles() is of this thread alone
        return self

    def count(self, name):
        return sum(f"Compiling jit({name})" in message for message in self.names)

    def __exit__(self, *_):
        jax.config.update("jax_log_compiles", False)
        self.logger.removeHandler(self.handler)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_are_the_whole_batch(tmp_path, parts):
    """Of a loss without randomness; the step after clipping, Adam and averages included."""
    error = lambda params, batch, key: ((Net().apply(params, batch) - batch) ** 2).mean()
    plain = loop.Task(TASK.init, lambda params, batch, key: (error(params, batch, key), {"mean": batch.mean()}))
    with jax.set_mesh(mesh.make(2, devices=jax.devices()[:4])):
        whole = run(tmp_path / "whole", task=plain, steps=5)
        assert_close = lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)
        jax.tree.map(assert_close, whole.params, run(tmp_path / "parts", task=plain, steps=5, accumulate=parts).params)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[0] for name in ("whole", "parts")]
    for name, value in log.json.loads(lines[0]).items():
        if name != "seconds":
            assert log.json.loads(lines[1])[name] == pytest.approx(value, rel=1e-4), name


def test_parts_that_devices_cannot_share_are_told(tmp_path):
    with pytest.raises(ValueError, match="a batch of 16 cannot be accumulated in 4 parts on 8 devices"):
        run(tmp_path, accumulate=4)


def test_a_batch_that_devices_cannot_share_names_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"config\.train\.toy\.batch=12 must be a multiple of the 8 devices"):
        run(tmp_path, batches=lambda start: iter([X[:12]]))


def test_non_finite_loss_names_the_step_and_the_last_good_checkpoint(tmp_path):
    def poisoned(start):
        for step, batch in enumerate(batches(start), start):
            yield batch * np.nan if step == 6 else batch

    with pytest.raises(FloatingPointError, match=r"loss=nan.* at step 6; last good checkpoint: .*checkpoints/4"):
        run(tmp_path, batches=poisoned)
    assert_same(run(tmp_path / "whole"), run(tmp_path))


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    def told(start):
        for step, batch in enumerate(batches(start), start):
            if step == 5:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "told", batches=told, log_every=4)
    assert stop.value.code == 0
    assert (tmp_path / "told" / "checkpoints" / "6").is_dir()
    assert_same(run(tmp_path / "whole", log_every=4), run(tmp_path / "told", log_every=4))
    lines = [
        [line for line in map(log.json.loads, (tmp_path / name / "metrics.jsonl").open()) if "loss" in line]
        for name in ("whole", "told")
    ]
    assert lines[0] == lines[1], "a line's mean covers the steps before the stop too"


def test_best_is_the_lowest_selection_loss():
    state = loop.create(jax.random.key(0), task=TASK, tx=TX, ema=(), select=True)
    moved = state._replace(params=jax.tree.map(lambda x: x + 1, state.params))
    state = loop.keep_best(state, jnp.float32(2.0))
    worse = loop.keep_best(moved._replace(best=state.best, best_loss=state.best_loss), jnp.float32(3.0))
    assert float(worse.best_loss) == 2.0
    assert_same(worse.best, state.params)
    better = loop.keep_best(worse, jnp.float32(1.0))
    assert_same(better.best, moved.params)


def test_golden_step():
    """One step of plain Adam on a scalar, by hand: p - rate * g / (|g| + eps), after clipping."""
    task = loop.Task(lambda key: {"scale": jnp.ones(())}, lambda p, b, k: (0.5 * (p["scale"] * b).sum() ** 2, {}))
    tx = loop.optimiser(steps=10, rate=0.1)
    state = loop.State(
        jnp.int32(0),
        {"scale": jnp.float32(1.0)},
        tx.init({"scale": jnp.float32(1.0)}),
        {"0.9": {"scale": jnp.float32(1.0)}},
        (),
        jnp.float32(jnp.inf),
    )
    state, metrics = loop.train_step(state, jnp.array([2.0]), task=task, tx=tx, key=jax.random.key(0))
    assert float(metrics["loss"]) == 2.0 and float(metrics["grad_norm"]) == 4.0
    assert float(state.params["scale"]) == pytest.approx(0.9, abs=1e-6)
    assert float(state.ema["0.9"]["scale"]) == pytest.approx(0.1 * 1.0 + 0.9 * 0.9, abs=1e-6)  # warm-up: decay 1/10
    assert int(state.step) == 1


def test_optimiser_schedule():
    tx = loop.optimiser(steps=100, rate=1.0, warmup=10, decay_to=0.5, clip=1e9)
    params = {"w": jnp.zeros(())}
    state, sizes = tx.init(params), []
    for _ in range(100):
        update, state = tx.update({"w": jnp.ones(())}, state, params)
        sizes.append(-float(update["w"]))
    assert sizes[0] == 0 and sizes[10] == pytest.approx(1, rel=1e-3) and sizes[-1] == pytest.approx(0.5, rel=2e-3)


@pytest.mark.parametrize(
    ("platform", "flags", "options"),
    [
        ("cpu", "", {"xla_backend_optimization_level": 1}),
        ("cpu", "--xla_backend_optimization_level=3", {}),
        ("cuda", "", {}),
    ],
)
def test_a_step_for_a_cpu_is_compiled_fast_where_nobody_says_how(monkeypatch, platform, flags, options):
    monkeypatch.setenv("XLA_FLAGS", flags)
    threads, asked, compiled = [], [], jax.jit(lambda x: x + 1)

    class Function:
        def lower(self, x):
            threads.append(threading.current_thread())
            return self

        def compile(self, options):
            threads.append(threading.current_thread())
            asked.append(options)
            return compiled.lower(1.0).compile(options)

    with layers.lowered_for(platform):
        future = loop.ahead(Function(), 1.0)
    assert future.result()(1.0) == 2.0 and asked == [options]
    assert threads[0] is threading.main_thread() is not threads[1]


@pytest.mark.parametrize("size", [0.0, 1e-3, 0.2, 5.0, 1e4, jnp.nan])
def test_gradients_are_clipped_as_optax_clips_them(size):
    draw = np.random.default_rng(0)
    grads = {"a": size * draw.standard_normal((3, 4, 5)), "b": [size * draw.standard_normal(7), jnp.float32(size)]}
    grads = jax.tree.map(jnp.float32, grads)
    ours, theirs = (tx.update(grads, tx.init(grads))[0] for tx in (loop.clipping(1.0), optax.clip_by_global_norm(1.0)))
    np.testing.assert_allclose(loop.norm(grads), optax.tree.norm(grads), rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)


def test_leaf_rule():
    assert mesh.leaf_spec((3, 3, 64, 128), 4) == jax.P(None, None, None, "fsdp")
    assert mesh.leaf_spec((3, 3, 128, 128), 4) == jax.P(None, None, "fsdp")
    assert mesh.leaf_spec((4, 4), 4) == jax.P()
    assert mesh.leaf_spec((3, 3, 64, 125), 64) == jax.P(None, None, "fsdp")
    assert mesh.leaf_spec((10_007, 3), 4) == jax.P()


def test_published_weights(tmp_path):
    tree = {"a": jnp.arange(3.0)}
    assert checkpoint.published(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="run --mode=train"):
        checkpoint.load(tmp_path, tree)
    checkpoint.publish(tmp_path, 7, tree)
    assert checkpoint.published(tmp_path) == 7
    assert_same(checkpoint.load(tmp_path, jax.eval_shape(lambda: tree)), tree)


def test_saving_and_restoring_compile_nothing(tmp_path, mesh_of):
    """Arrays on eight devices, whole on each and split over two: a slicing for each shape and device took minutes."""
    with jax.set_mesh(mesh_of(8, 2)):
        tree = {str(n): np.arange(n * 16.0 * 64).reshape(n * 16, 64) for n in (1, 2, 17)}
        tree = jax.tree.map(jax.device_put, tree, mesh.shardings(tree))
        assert {leaf.sharding.is_fully_replicated for leaf in tree.values()} == {True, False}
        with _Compiles() as compiled:
            checkpoint.publish(tmp_path, 1, tree)
            back = checkpoint.load(tmp_path, tree)
    assert not compiled.names
    assert_same(back, tree)
    assert jax.tree.map(lambda leaf: leaf.sharding, back) == jax.tree.map(lambda leaf: leaf.sharding, tree)


def test_stream_drops_the_padding():
    rows = np.arange(20, dtype=np.float32).reshape(10, 2)
    padded = [(rows[:8], 8), (np.concatenate([rows[8:], np.zeros((6, 2), np.float32)]), 2)]
    out = np.concatenate(list(mesh.stream(jax.jit(lambda x: 2 * x), padded)))
    np.testing.assert_array_equal(out, 2 * rows)


def test_on_eval_adds_metrics_and_may_halt(tmp_path):
    seen = []

    def on_eval(step, state):
        seen.append((step, int(state.step)))
        return {"looked": float(step)}, step == 8

    state = run(tmp_path, eval_every=4, on_eval=on_eval)
    assert seen == [(4, 4), (8, 8)] and int(state.step) == 8
    lines = [log.json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["looked"] for line in lines if "held_out_loss" in line] == [4, 8]
    assert (tmp_path / "checkpoints" / "8").is_dir()


def contrast(params, batch, key):
    """A loss that is no mean over images: each is told from all others, as a copy detector's."""
    a, b = (Net().apply(params, x).mean((1, 2)) for x in (batch, batch + 0.1 * jax.random.normal(key, batch.shape)))
    logits = a @ b.T
    return (jax.nn.logsumexp(logits, axis=1) - jnp.diag(logits)).mean(), {}


@pytest.mark.parametrize("n", [3, 16, 21, 45])
@pytest.mark.parametrize("of", [loss, contrast])
def test_the_held_out_loss_is_of_the_same_images_on_any_number_of_devices(mesh_of, of, n):
    params = layers.init(TASK.init, jax.random.key(0))
    spread = jax.jit(lambda batch: of(params, mesh.spread(batch), jax.random.key(1))[0])
    by_devices = []
    for devices, fsdp in ((1, 1), (2, 1), (4, 2), (8, 1)):
        with jax.set_mesh(mesh_of(devices, fsdp)):
            batches = list(loop.whole_batches(data.in_order, X[:n], 16))
            np.testing.assert_array_equal(np.concatenate([np.asarray(x) for x in batches]), X[:n])
            by_devices.append(float(loop.mean_over_rows([(batch, spread(batch)) for batch in batches])))
    np.testing.assert_allclose(by_devices, by_devices[0], rtol=1e-5)


def test_rows_that_devices_do_not_divide_are_still_shared(mesh_of):
    with jax.set_mesh(mesh_of(8, 1)):
        (batch,) = loop.whole_batches(data.in_order, X[:5], 16)
        fn = jax.jit(lambda x: jnp.tanh(mesh.spread(x).reshape(len(x), -1) @ jnp.ones((288, 7))).sum())
        dots = [line for line in fn.lower(batch).compile().as_text().splitlines() if " dot(" in line]
        assert dots and not any("f32[5,7]" in line for line in dots), "every device computes all five"


def test_the_mean_is_over_rows():
    found = loop.mean_over_rows(
        [(np.ones((3, 2)), {"mean": jnp.float32(1)}), (np.ones((1, 2)), {"mean": jnp.float32(5)})]
    )
    assert float(found["mean"]) == pytest.approx(2.0)
