"""What a command line or a settings file asks for: options, and what can be known to be wrong with them."""
