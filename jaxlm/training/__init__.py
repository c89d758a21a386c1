"""State, step, loop, optimizers, checkpoints, metrics, guards."""
