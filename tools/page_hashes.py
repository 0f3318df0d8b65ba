"""Write the hashes of the live page's style and script into its Content-Security-Policy.

    python tools/page_hashes.py [dashboard.html]

`make hashes` runs it after a change of the page: a browser ignores a block whose hash is wrong.
"""

import re
import sys
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "dashboard.html"


def with_hashes(page: str) -> str:
    for tag in ("style", "script"):
        block = page.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = b64encode(sha256(block.encode()).digest()).decode()
        page = re.sub(f"{tag}-src '[^']*'", f"{tag}-src 'sha256-{digest}'", page, count=1)
    return page


if __name__ == "__main__":
    path = Path(sys.argv[1]) if sys.argv[1:] else PAGE
    path.write_text(with_hashes(path.read_text()))
