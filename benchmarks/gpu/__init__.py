"""Everything that only a GPU can prove or measure, as one command: `python -m benchmarks.gpu` (docs/gpu.md)."""
