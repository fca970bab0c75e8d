"""What is done with an image's weights after training: merging, adapters."""
