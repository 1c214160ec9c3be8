"""Transcoders: training, circuits, and the replication of Dunefsky, Chlenski and Nanda (2024)."""
