"""The hard stage: Poisson sampling, one gradient per image, clipping, noise, and the trainer that makes a step."""
