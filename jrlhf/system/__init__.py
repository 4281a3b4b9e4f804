"""Process-level parts: paths, text files, signals, terminal, environment and errors. Imports nothing else of jrlhf."""
