"""A run: everything is prepared, then steps are taken."""
