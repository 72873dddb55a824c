"""The one training loop. A task is two pure functions; everything about machines and failures is here."""

import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from clu import parameter_overview

from launch import checkpoint, layers, log, mesh, preempt


class Task(NamedTuple):
    """What is trained: `init(key) -> params` and `loss(params, batch, key) -> (scalar, {name: scalar})`.

    Several players (a generator and its adversary, a codebook that follows its encoder) are one task too: the loss sums
    theirs, `stop_gradient` keeps each from the others' parameters, and an `optax.partition` gives each its own optimiser.
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class State(NamedTuple):
    """Everything that a run needs to go on; randomness and data position follow from `step`."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: dict[str, Any]  # decay as text -> averaged parameters
    best: Any  # parameters of the lowest selection loss so far; () where nothing is selected
    best_loss: jax.Array


def gradient_only(loss: jax.Array) -> jax.Array:
    """Zero, with the gradient of `loss`: what a player adds to a loss whose value is another's."""
    return loss - jax.lax.stop_gradient(loss)


def optimiser(
    *,
    steps: int,
    rate: float,
    warmup: int = 0,
    decay_to: float = 1.0,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015; AdamW where `weight_decay` > 0) after clipping the gradients' global norm.

    The rate warms up linearly for `warmup` steps, then follows a cosine to `decay_to * rate` at `steps`. Where it does not
    decay, `steps` is no part of it, and a longer run has the same compiled step.
    """
    after = optax.cosine_decay_schedule(rate, max(steps - warmup, 1), alpha=decay_to)
    if decay_to == 1.0:
        after = optax.constant_schedule(rate)
    schedule = optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup]) if warmup else after
    adam = optax.adamw(schedule, b1, b2, weight_decay=weight_decay) if weight_decay else optax.adam(schedule, b1, b2)
    return optax.chain(clipping(clip), adam)


def clipping(most: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm(most)` by one factor for all gradients, which costs no pass over them: XLA writes gradients
    that are divided by their norm to memory before it uses them."""

    def update(grads: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        factor = most / jnp.maximum(norm(grads), most)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together, of products with themselves: squares would be written to memory."""
    square = functools.partial(jnp.vdot, precision=jax.lax.Precision.HIGHEST)
    return jnp.sqrt(sum(square(leaf, leaf) for leaf in jax.tree.leaves(tree)))


def create(
    key: jax.Array, *, task: Task, tx: optax.GradientTransformation, ema: tuple[float, ...], select: bool
) -> State:
    """The state before the first step; `select` reserves room for the parameters of the best selection loss."""
    params = layers.init(task.init, key)
    copy = functools.partial(jax.tree.map, jnp.copy)
    averages = {str(decay): copy(params) for decay in ema}
    return State(jnp.int32(0), params, tx.init(params), averages, copy(params) if select else (), jnp.float32(jnp.inf))


def train_step(
    state: State, batch: Any, *, task: Task, tx: optax.GradientTransformation, key: jax.Array, accumulate: int = 1
) -> tuple[State, dict[str, jax.Array]]:
    """One optimiser step and one step of every moving average (warmed up as min(decay, (1 + t) / (10 + t))).

    `accumulate` parts of the batch pass through the model one after the other, and their gradients are averaged.
    """
    gradient = jax.value_and_grad(task.loss, has_aux=True)
    key = jax.random.fold_in(key, state.step)
    if accumulate == 1:
        (loss, metrics), grads = gradient(state.params, batch, key)
    else:
        parts, keys = in_parts(batch, accumulate), jax.random.split(key, accumulate)
        each = lambda part: gradient(state.params, *part)
        first = jax.tree.map(jnp.zeros_like, jax.eval_shape(each, jax.tree.map(lambda x: x[0], (parts, keys))))
        add = lambda total, part: (jax.tree.map(jnp.add, total, each(part)), None)
        total, _ = jax.lax.scan(add, first, (parts, keys))
        (loss, metrics), grads = jax.tree.map(lambda x: x / accumulate, total)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    warm = (1.0 + state.step) / (10.0 + state.step)
    ema = {
        decay: optax.incremental_update(params, average, 1.0 - jnp.minimum(float(decay), warm))
        for decay, average in state.ema.items()
    }
    metrics = {"loss": loss, "grad_norm": norm(grads), **metrics}
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics


def agreeing(step_fn: Callable) -> Callable:
    """A train step that also takes `preempt.flags` and returns in its metrics, as `told`, whether any of them is set.

    All processes fetch those metrics at the same step, so they learn together that one of them was told to stop. Inside
    the step it costs one small sum; as a collective of its own it could overtake the step's on another host.
    """

    @functools.wraps(train_step)
    def step(state: State, batch: Any, key: jax.Array, flags: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        state, metrics = step_fn(state, batch, key)
        return state, {**metrics, "told": flags.max()}

    return step


def in_parts(batch: Any, parts: int) -> Any:
    """A batch (B, ...) as (parts, B / parts, ...), part i rows i, i + parts, ...: so every device keeps the rows it has.

    Raises:
      ValueError: if the parts cannot be of one size, or the devices cannot share one.
    """

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % (parts * mesh.shares()):
            raise ValueError(
                f"a batch of {x.shape[0]} cannot be accumulated in {parts} parts on {mesh.shares()} devices: "
                "change batch or accumulate in its section of config.train"
            )
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def ahead(fn: Callable, *args: Any) -> futures.Future:
    """Lowers the jitted `fn` for `args` (arrays or `ShapeDtypeStruct`s with shardings) and starts compiling it in a thread,
    while this one does something else; the result is called in place of `fn`.

    Python's threads take turns, so lowering would be no sooner done in the thread; XLA's compiler is not theirs. For a CPU
    it compiles by the second of LLVM's four levels, unless XLA_FLAGS names one: that takes 0.75 of the processor's time, and
    a training step takes as long as by the fourth, since what is heavy in it comes compiled.
    """
    level = "xla_backend_optimization_level"
    options = {level: 1} if layers.on_cpu() and level not in os.environ.get("XLA_FLAGS", "") else {}
    thread = futures.ThreadPoolExecutor(1)
    result = thread.submit(fn.lower(*args).compile, options)
    thread.shutdown(wait=False)
    return result


def keep_best(state: State, loss: jax.Array) -> State:
    """Remembers the parameters if this selection loss is the lowest so far."""
    better = loss < state.best_loss
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), state.params, state.best)
    return state._replace(best=best, best_loss=jnp.minimum(loss, state.best_loss))


def fit(
    name: str,
    task: Task,
    batches: Callable[[int], Iterable[Any]],
    *,
    folder: Path,
    steps: int,
    tx: optax.GradientTransformation,
    key: jax.Array,
    ema: tuple[float, ...] = (),
    prepare: Callable[[Any, jax.Array], Any] | None = None,
    held_out: Callable[[], Iterable[Any]] | None = None,
    select: bool = False,
    accumulate: int = 1,
    on_eval: Callable[[int, State], tuple[dict[str, float], bool]] | None = None,
    save_every: int = 500,
    eval_every: int = 250,
    log_every: int = 20,
) -> State:
    """Trains `task` for `steps` steps, from the newest checkpoint in `folder` if there is one.

    Args:
      name: what the progress line and messages call it.
      batches: `batches(start)` yields this process's rows of the global batches of steps start, start + 1, ...
      key: the run's randomness; step t uses `fold_in(key, t)`.
      ema: decays of the moving averages to keep.
      prepare: jitted `prepare(batch, key) -> batch` run on the device before the step (frozen models, augmentation).
      held_out: yields global batches on which the loss and its metrics are reported, as `held_out_...`, every `eval_every`
        steps, each batch weighted by its rows: see `whole_batches`.
      on_eval: `on_eval(step, state) -> (metrics, halt)` after each measurement of the held-out loss, on every process;
        `halt` ends training at that step, checkpoint saved.
      select: keep the parameters with the best held-out loss in `State.best`.
      accumulate: parts of a batch that pass through the model one after the other, to save memory.
    Returns:
      The state after the last step, or after the one at which `on_eval` halted.
    Raises:
      FloatingPointError: on a non-finite loss, naming the step and the last good checkpoint.
      SystemExit: as `preempt.stop`, after SIGTERM to any of the processes, once all have saved the same step; the same
        command goes on from there, on another number of processes if need be.
    """
    make = functools.partial(create, task=task, tx=tx, ema=ema, select=select)
    abstract = mesh.placed(jax.eval_shape(make, key))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make_fn = jax.jit(make, out_shardings=shardings)
    init_key, step_key, prepare_key, eval_key = jax.random.split(key, 4)
    with preempt.noting() as told, checkpoint.manager(folder / "checkpoints") as checkpoints:
        start = checkpoints.latest_step() or 0
        begin = lambda: checkpoint.restore(checkpoints, abstract) if start else make_fn(init_key)
        if start >= steps:
            return begin()
        several = jax.process_count() > 1

        @functools.wraps(train_step)
        def one_step(state: State, batch: Any, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
            return train_step(state, batch, task=task, tx=tx, key=key, accumulate=accumulate)

        step_fn = jax.jit(
            agreeing(one_step) if several else one_step,
            donate_argnums=0,
            out_shardings=(shardings, mesh.replicated()),
        )
        stream = shared(name, batches(start))
        first = next(stream)
        prepared = mesh.placed_rows(jax.eval_shape(prepare or (lambda batch, _: batch), first, prepare_key))
        stream = itertools.chain(iter([first]), stream)
        del first  # it would stay on the devices, as it would in the list itself
        told_of = lambda: [mesh.put(preempt.flags())] if several else []
        compiling = ahead(step_fn, abstract, prepared, step_key, *told_of())
        state = begin()
        if not start:
            log.say(f"{name}: {parameter_overview.count_parameters(state.params):,} parameters")
        loss_fn = jax.jit(lambda params, batch, key: task.loss(params, mesh.spread(batch), key))
        best_fn = jax.jit(keep_best, donate_argnums=0, out_shardings=shardings)
        metrics = log.Metrics(folder, start)
        bar = log.progress(name, steps, start)
        pending: deque[tuple[int, dict]] = deque()
        agreed = False

        def collect(waiting: int) -> None:
            """Fetches metrics of all but the `waiting` newest steps, so that the device is never waited for."""
            nonlocal agreed
            while len(pending) > waiting:
                step, values = pending.popleft()
                values = {k: float(v) for k, v in jax.device_get(values).items()}
                agreed |= values.pop("told", 0.0) > 0
                if not all(abs(v) < float("inf") for v in values.values()):
                    good = checkpoints.latest_step()
                    where = f"{folder / 'checkpoints' / str(good)}" if good is not None else "none yet"
                    bad = ", ".join(f"{k}={v}" for k, v in values.items() if not abs(v) < float("inf"))
                    raise FloatingPointError(f"{name}: {bad} at step {step}; last good checkpoint: {where}")
                metrics.window.append(values)
                if step == start:
                    bar.unpause()  # compilation tells nothing of how long the other steps will take
                bar.update()
                if (step + 1) % log_every == 0 or step + 1 == steps:
                    means = {k: sum(w[k] for w in metrics.window) / len(metrics.window) for k in values}
                    metrics.write(step + 1, means)
                    bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
                    metrics.window.clear()

        halted = False
        for step, batch in zip(range(start, steps), stream, strict=False):
            if prepare:
                batch = mesh.put_rows(prepare(batch, jax.random.fold_in(prepare_key, step)))
            state, values = compiling.result()(state, batch, step_key, *told_of())
            pending.append((step, values))
            collect(waiting=2 if step > start else 0)  # that the first step is done is told at once
            done = step + 1
            stop = done == steps or (agreed if several else told())
            if held_out and (done % eval_every == 0 or done == steps):
                loss, others = mean_over_rows([(b, loss_fn(state.params, b, eval_key)) for b in held_out()])
                if select:
                    state = best_fn(state, loss)
                values, halted = on_eval(done, state) if on_eval else ({}, False)
                found = jax.device_get({"loss": loss, **others})
                metrics.write(done, {f"held_out_{k}": float(v) for k, v in found.items()} | values)
                stop = stop or halted
            if done % save_every == 0 or stop:
                collect(waiting=0)
                metrics.keep_window(done)
                checkpoint.save(checkpoints, done, state)
            if stop:
                break
        bar.close()
        metrics.close()
        checkpoints.wait_until_finished()
        if done < steps and not halted:
            log.say(f"{name}: told to stop; saved at step {done}. The same command goes on from there.")
            preempt.stop()
        return state


def shared(name: str, batches: Iterable[Any]) -> Iterator[Any]:
    """This process's rows of each batch as global arrays. Raises ValueError where the devices do not divide a batch."""
    for batch in batches:
        rows = len(jax.tree.leaves(batch)[0]) * jax.process_count()
        if rows % mesh.shares():
            devices = f"the {mesh.shares()} devices that split a batch"
            raise ValueError(f"config.train.{name}.batch={rows} must be a multiple of {devices}")
        yield mesh.put(batch)


def mean_over_rows(found: Sequence[tuple[Any, Any]]) -> Any:
    """Mean of what was measured (a tree of scalars) of each batch, each weighted by its rows: (batch, measured) of each."""
    rows = jnp.array([len(jax.tree.leaves(batch)[0]) for batch, _ in found])
    return jax.tree.map(lambda *values: rows / rows.sum() @ jnp.stack(values), *(measured for _, measured in found))


def whole_batches(in_order: Callable, images: Sequence, batch: int) -> Iterator[jax.Array]:
    """`images` in order, each once, as global batches of `batch`, of which the last has the rows that are left.

    So they are the same on any number of devices. That last one is whole on every device, since no number of rows but
    `batch` need be a multiple of the devices; `fit` spreads the work on it all the same.
    """
    for x, valid in in_order(images, batch):
        yield mesh.put(x[mesh.rows(batch)]) if valid == batch else mesh.put_whole(x[:valid])
