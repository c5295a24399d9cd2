"""Sharing of results: model card, export, Hub, synthetic dataset, and the checks of what was published."""
