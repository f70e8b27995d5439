"""Language models that read a text with an adapter, and how much a smaller one changes what they make of it."""
