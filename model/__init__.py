"""The model: vision encoder, perceptual weights generator, injection into a decoder, and the baselines.

Nothing in here knows of training, data sources or Hydra.
"""
