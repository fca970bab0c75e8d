"""The paper: the perceptual weights generator, where its deltas go, and the weights it makes."""
