"""Which weights of a base the layers of an adapter change."""
