"""Rows in, padded batches out. A package, so that its file names need not be unique."""
