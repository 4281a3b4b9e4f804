"""The loop that every stage shares, and what starts it; it knows no algorithm."""
