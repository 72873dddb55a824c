"""Players of tests/test_generator.py trained as one of several processes: `python -m tests.players FOLDER`."""

import os
import sys
from pathlib import Path

import jax
import numpy as np
import optax

from launch import loop, machine, mesh
from tests.test_generator import SEVERAL, build, train


def main(folder: str) -> None:
    jax.config.update("jax_num_cpu_devices", 1)
    machine.connect(machine.launcher(os.environ, tpu=False))
    loop.optimiser = lambda **_: optax.sgd(0.05)
    with jax.set_mesh(mesh.make()):
        for players, (kind, name, first) in SEVERAL.items():
            state = train(build(kind, Path(folder) / "two" / players, first), name, steps=4)
            leaves = [mesh.fetch(leaf) for leaf in jax.tree.leaves(state.params)]
            if jax.process_index() == 0:
                np.savez(Path(folder) / f"{players}.npz", *leaves)


if __name__ == "__main__":
    main(*sys.argv[1:])
