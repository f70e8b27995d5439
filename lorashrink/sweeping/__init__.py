"""One adapter at many sizes."""
