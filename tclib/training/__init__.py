"""Dictionaries trained side by side from one harvest of activations, with exact gradients and resume."""
