"""The easy stages: what is released of the private images once, and how a network is pretrained on it."""
