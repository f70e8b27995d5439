"""Shrinking without a recipe: the method, the size and the dtype follow from what is at hand."""
