"""Data preparation: sources to verified shards of one sample schema, and the third-party parts they need."""
