"""A run on disk: folder, lock, checkpoints, metrics, trackers, exports, and the inputs and origins of its stages."""
