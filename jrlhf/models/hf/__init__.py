"""Hugging Face folders: their configs, names, weights and adapters, read and written."""
