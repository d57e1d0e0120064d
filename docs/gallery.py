"""Draw the pictures of docs/plots.md anew, with the examples of the page itself: `python docs/gallery.py`.

The examples run in an empty folder. The pictures that they write come to docs/images with 128 colors, which keeps each
of them below 80 kB. Needs `pip install 'moe-route[all]'`.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tempfile
from pathlib import Path

from PIL import Image

from moe_route.base.files import replacing

PAGE = Path(__file__).parent / "plots.md"
IMAGES = Path(__file__).parent / "images"


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    shown = set(re.findall(r"\(images/([\w-]+\.png)\)", page))
    namespace: dict[str, object] = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S):
            exec(block, namespace)
        for name in sorted(shown):
            with Image.open(name) as image, replacing(IMAGES / name) as stream:
                data = io.BytesIO()
                image.convert("RGB").quantize(128).save(data, format="png", optimize=True)
                stream.write(data.getvalue())
            sys.stdout.write(f"{name}: {len(data.getvalue()) / 1000:.0f} kB\n")


if __name__ == "__main__":
    main()
