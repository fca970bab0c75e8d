"""Training: configuration, engine, loop, checkpoints, tracking, evaluation and reports."""
