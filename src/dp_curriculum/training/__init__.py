"""A run from its plan to its release: stages, resuming, rehearsal, finishing."""
