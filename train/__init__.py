"""Training of LyCORIS checkpoints; empty in this version."""
