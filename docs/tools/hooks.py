"""Hooks of mkdocs: links to files of the repository, and pages that the navigation does not name.

A page links to `../sglang_tokenweave/plan.py`, which works in a checkout. In the site such a file
is copied as text below `source/`, so the site needs neither the repository nor a network.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"\]\(\.\./([^)#\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the repository's files that pages link to; name every page in the navigation."""
    pages = list(files.documentation_pages())
    for path in sorted({path for page in pages for path in _LINK.findall(page.content_string)}):
        # What does not exist is not added: mkdocs then reports the link.
        if (ROOT / path).is_file():
            source = File.generated(config, _target(path), abs_src_path=str(ROOT / path))
            files.append(source)
    named = re.findall(r"[\w/-]+\.md", str(config.nav))
    unnamed = [page.src_uri for page in pages if page.src_uri not in named]
    config.nav = [*config.nav, *({_title(files, path): path} for path in unnamed)]
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links to the repository's files to their copies in the site."""
    return _LINK.sub(lambda link: f"]({_target(link[1])})", markdown)


def _target(path: str) -> str:
    return f"source/{path}.txt"


def _title(files: Files, path: str) -> str:
    page = files.get_file_from_path(path)
    heading = re.search(r"^# (.+)$", page.content_string if page else "", re.MULTILINE)
    return heading[1] if heading else path
