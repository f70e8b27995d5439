"""The keys of lorashrink's own entries in the metadata of a safetensors file."""

# Where a shrunk file comes from. Equal entries mean equal files.
SOURCE, BASE, RECIPE, OPTIONS, VERSION = (
    f"lorashrink.{name}" for name in ("source_sha256", "base", "recipe", "options", "version")
)
ENERGY, ERROR, NORM_RATIO = "lorashrink.energy", "lorashrink.relative_error", "lorashrink.norm_ratio"
SOURCES = "lorashrink.sources"  # of a sum
REFINED = "lorashrink.refined"
PACKED = "lorashrink.packed"  # of a packed file: its version, and the hash of what it unpacks to
