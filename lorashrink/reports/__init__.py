"""Reports about one adapter as a self-contained HTML page."""
