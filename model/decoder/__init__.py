"""What is done to a Hugging Face decoder: deltas, packing, loss, norms."""
