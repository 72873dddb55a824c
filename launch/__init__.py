"""Everything between a pure task and real machines: mesh, layers' lowering, the one training loop, checkpoints, logs."""
