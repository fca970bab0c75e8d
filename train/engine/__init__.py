"""A stage: DeepSpeed engine, loop, checkpoints, export."""
