"""Sample, score, read and evaluate: what every stage that learns from its own answers shares."""
