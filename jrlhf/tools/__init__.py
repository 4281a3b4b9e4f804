"""Commands beside training: export, generate, score, show, verify, quickstart."""
