"""`pack` and `unpack`: adapters with few bits per number, for keeping and sending."""
