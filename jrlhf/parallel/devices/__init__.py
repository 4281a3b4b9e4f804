"""Devices by name: their peaks, their topologies, and how long collectives take between them."""
