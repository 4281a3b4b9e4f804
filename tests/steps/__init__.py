"""Every step on three models that know nothing of jrlhf. A package, so that tests share them by relative import."""
