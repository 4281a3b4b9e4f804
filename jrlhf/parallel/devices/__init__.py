"""Known devices: their peak rates, their topologies, and the bytes that collectives send between them."""
