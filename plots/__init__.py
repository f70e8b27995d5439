"""Figures: one file each, a function from a result table to a matplotlib figure."""
