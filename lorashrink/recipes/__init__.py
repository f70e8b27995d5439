"""Recipes: which dimensions of each layer are kept."""
