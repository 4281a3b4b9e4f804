"""Commands beside training: export, generate, sample, score, show, verify, quickstart."""
