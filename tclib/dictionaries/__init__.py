"""Sparse dictionaries: the equations of transcoders and SAEs, and their files, ours and other libraries'."""
