"""A run on disk: its folder, lock, checkpoints, log, trackers, exports, and what its stages were made from."""
