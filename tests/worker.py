"""A toy training run as one of several processes: `python -m tests.worker FOLDER STEPS SECONDS_A_STEP [TOLD_AT]`.

The last process is told to stop by itself while it looks at its model after TOLD_AT steps.
"""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from launch import checkpoint, loop, machine, mesh, preempt

X = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
BATCH = 16


def init(key):
    return {"kernel": jnp.ones((16, 16)), "bias": jnp.zeros(16)}


def loss(params, batch, key):
    noisy = batch + 0.1 * jax.random.normal(key, batch.shape)
    return ((jnp.tanh(noisy @ params["kernel"] + params["bias"]) - batch) ** 2).mean(), {}


def main(folder: str, steps: str, seconds: str, told_at: str = "0") -> None:
    machine.connect(machine.launcher(os.environ, tpu=False))
    preempt.listen()

    def batches(start):
        for step in range(start, int(steps)):
            time.sleep(float(seconds))
            yield X[np.random.default_rng(step).permutation(64)[:BATCH]][mesh.rows(BATCH)]

    outputs = jax.jit(lambda params, x: jnp.tanh(x @ params["kernel"] + params["bias"]))

    def look(step, state):
        """Streams over batches, as the diffusion stage does when it is looked at."""
        if step == int(told_at) and jax.process_index() == jax.process_count() - 1:
            signal.raise_signal(signal.SIGTERM)
        batches = [(X[:BATCH], BATCH), (X[BATCH : 2 * BATCH], 3)]
        seen = np.concatenate(list(mesh.stream(lambda x: outputs(state.params, x), batches)))
        assert seen.shape == (BATCH + 3, 16)
        assert mesh.from_first(np.array([jax.process_index()])) == [0]
        seen_by_first = Path(folder, "checkpoints" if jax.process_index() == 0 else "elsewhere")
        assert checkpoint.exists(seen_by_first)
        checkpoint.write_json(Path(folder, "said.json"), {"step": step})
        told = checkpoint.read_json(Path(folder, "said.json" if jax.process_index() == 0 else "elsewhere"))
        assert told == {"step": step} and checkpoint.read_json(Path(folder, "nothing")) is None
        return {"seen": float(seen.mean())}, False

    with jax.set_mesh(mesh.make()):
        loop.fit(
            "toy", loop.Task(init, loss), batches, folder=Path(folder), steps=int(steps),
            tx=loop.optimiser(steps=int(steps), rate=1e-2), key=jax.random.key(0), ema=(0.9,),
            held_out=lambda: [mesh.put(X[:BATCH][mesh.rows(BATCH)])], select=True, on_eval=look,
            save_every=25, eval_every=10, log_every=1,
        )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
