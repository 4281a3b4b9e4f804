"""What every stage shares: the loop, what starts it, random keys, and programs by shapes. It knows no algorithm."""
