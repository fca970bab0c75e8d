"""Prepared data on disk: sample, shards, manifest, reader. What training may import of `data_prep`, with `text`."""
