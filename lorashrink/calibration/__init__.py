"""Calibrated shrinking: statistics of a running model, and refinement."""
