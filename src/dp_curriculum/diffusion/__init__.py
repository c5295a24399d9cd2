"""What a diffusion model computes, of public things alone: EDM's loss and noise levels, precision, sample sheets."""
