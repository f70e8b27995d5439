"""Results of the commands, as frozen dataclasses."""
