"""Diffusion, without any privacy: EDM's loss and noise levels, precision, sample sheets."""
