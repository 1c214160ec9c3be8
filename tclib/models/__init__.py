"""Frozen language models of every architecture, seen in one processed basis."""
