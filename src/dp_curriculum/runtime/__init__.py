"""The machine and the disk: processes, storage that survives a crash, checkpoints, trackers."""
