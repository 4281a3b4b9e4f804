"""A run on disk: folder, lock, checkpoints, metrics, trackers, exports, and the origins of its stages."""
