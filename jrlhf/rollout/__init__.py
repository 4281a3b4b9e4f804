"""Sample, score, read, evaluate and plan: what every stage that learns from its own answers shares."""
