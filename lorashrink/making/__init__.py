"""Commands that make other adapters: merge, extract and convert."""
