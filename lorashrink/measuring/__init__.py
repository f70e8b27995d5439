"""Curves of quality over size, measured on anyone's model and adapters."""
