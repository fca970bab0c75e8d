"""Processes of a run: launching, ranks, signals, the run directory."""
