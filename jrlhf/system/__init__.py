"""Process-level parts: paths, text files, signals, terminal and environment. Imports nothing else of jrlhf."""
