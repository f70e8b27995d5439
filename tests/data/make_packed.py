"""Makes tests/data/packed: `python tests/data/make_packed.py`. A new version of the format gets a file of its own."""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import lorashrink

HERE = Path(__file__).parent

if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "packing"), str(HERE.parent / "making")]
    from test_packing import small

    with tempfile.TemporaryDirectory() as folder:
        source = small(Path(folder) / "a.safetensors", seed=7, width=64)
        golden = HERE / "packed" / "golden.safetensors"
        lorashrink.pack(source, output=golden, quality=45, force=True)
        ordinary = Path(folder) / "u.safetensors"
        lorashrink.unpack(golden, output=ordinary)
        digest = hashlib.sha256(ordinary.read_bytes()).hexdigest()
    (HERE / "packed" / "expected.json").write_text(json.dumps({"file_sha256": digest}, indent=1) + "\n")
