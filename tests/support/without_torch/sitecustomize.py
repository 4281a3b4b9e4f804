"""Python reads this file first where its folder is on the path: the process finds no torch, installed or not."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
