"""Every core function against a plain NumPy loop. A package, so that tests share ``oracles`` by relative import."""
