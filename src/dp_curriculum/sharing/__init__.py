"""What leaves the machine: model card, export, Hub, synthetic dataset, and the checks of what was published."""
