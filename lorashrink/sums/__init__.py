"""Weighted sums of adapters."""
