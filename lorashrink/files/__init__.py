"""Tensor files: reading, writing, and hashes."""
