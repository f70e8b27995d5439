"""The main line: `resize`, from a request to written files."""
