"""What `make docs` does before mkdocs: pages from outside docs/, and links to files that are no pages.

Documents link as they lie in the repository, so that they can be read there. On the site a link to another document
becomes one to its page, and a link to a file of code becomes the file's name. A link that leads nowhere is a warning,
which `--strict` makes an error.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
_log = logging.getLogger("mkdocs.hooks.links")


def on_files(files: Any, config: Any) -> Any:
    """Add the documents outside docs/."""
    for source, place in config.extra["pages"].items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links lead to pages."""
    pages = config.extra["pages"]
    place = page.file.src_uri
    document = next((source for source, target in pages.items() if target == place), f"docs/{place}")

    def moved(link: str) -> str | None:
        """The link on the site; None for a file that is not on it."""
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(document), path))
        if not (ROOT / target).exists():
            _log.warning("%s links to %s, which does not exist", document, link)
            return link
        on_site = pages.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if on_site is None or files.get_file_from_path(on_site) is None:
            return None
        relative = posixpath.relpath(on_site, posixpath.dirname(place) or ".")
        return f"{relative}#{anchor}" if anchor else relative

    def of_markdown(match: re.Match[str]) -> str:
        text, link = match.groups()
        if "://" in link or link.startswith("#"):
            return match[0]
        target = moved(link)
        return text if target is None else f"[{text}]({target})"

    def of_html(match: re.Match[str]) -> str:
        return f'src="{moved(match[1]) or match[1]}"'

    # What stands in a block of code is no link.
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r'src="([^":]+)"', of_html, parts[i])
        parts[i] = re.sub(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)", of_markdown, parts[i])
    return "".join(parts)
