"""What mkdocs does for modekit's site (`hooks` in mkdocs.yml): pages outside of docs/ join it, and links follow them.

The same Markdown reads well in a checkout, where docs/routers.md links to ../benchmarks/demo.md. On the site docs/ is the
top: docs/routers.md becomes routers.md, benchmarks/demo.md stays what it is. Files that pages link to come along.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("docs/*.md", "benchmarks/*.md", "deploy/README.md", "SECURITY.md", "CONTRIBUTING.md")
_LINK = re.compile(r"(\]\()([^)#\s:]+)")  # of Markdown, without its anchor and without another address


def on_files(files: Any, *, config: Any) -> Any:
    """Add pages outside of docs/, and every file of the repository that a page links to."""
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    linked = {target for page in pages for target in _targets(page) if (ROOT / target).is_file()}
    for path in sorted({str(page.relative_to(ROOT)) for page in pages} | linked):
        if not path.startswith("docs/") and path != "README.md":
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between files of the site."""
    here = posixpath.dirname(page.file.src_uri)
    folder = _folder(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        return link[1] + posixpath.relpath(target.removeprefix("docs/"), here or ".")

    return _LINK.sub(moved, markdown)


def _folder(src_uri: str) -> str:
    """Folder in the repository of a page of the site."""
    outside = src_uri in ("SECURITY.md", "CONTRIBUTING.md") or src_uri.startswith(("benchmarks/", "deploy/"))
    return posixpath.dirname(src_uri if outside else f"docs/{src_uri}")


def _targets(page: Path) -> Iterator[str]:
    """Files that a page links to, from the top of the repository."""
    folder = str(page.parent.relative_to(ROOT))
    for link in _LINK.finditer(page.read_text(encoding="utf-8")):
        yield posixpath.normpath(posixpath.join(folder, link[2]))
