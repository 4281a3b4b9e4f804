"""The process: its paths, text by lines, signals, terminal and environment. Imports nothing else of jrlhf."""
