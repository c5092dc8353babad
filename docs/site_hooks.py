"""Hooks of mkdocs: documents of the repository's root become pages, and links to them follow.

Links in the documents are right on the repository's own pages; here they are turned to the site's.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}

# The theme takes what stands in for a worker from there; ours lies beside the pages.
SHIM = "https://unpkg.com/iframe-worker/shim"


def on_files(files, config):
    """Add the documents that lie outside docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        folder = Path(source).parent
        files.append(File.generated(config, page, content=from_root(text, folder)))
    return files


def from_root(text, folder):
    """Links of a document of the root, as they are from docs/; files of code lose their link."""

    def turned(found):
        words, target = found[1], found[2]
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path = (folder / target).as_posix()
        page = "index.md" if path == "README.md" else PAGES.get(path)
        if page is not None:
            return f"[{words}]({page})"
        if path.startswith("docs/"):
            return f"[{words}]({path.removeprefix('docs/')})"
        if path.startswith("../docs/") or "/../docs/" in path:
            return f"[{words}]({path.split('docs/', 1)[1]})"
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{folder}: link to {target}, which does not exist")
        return words

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", turned, text)


def on_page_markdown(markdown, page, config, files):
    """Turn links from docs/ to documents of the root."""
    for source, name in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({name}")
    return markdown


def on_post_page(output, page, config):
    """Nothing is taken from the network."""
    return output.replace(SHIM, f"{'../' * page.url.count('/')}assets/file_worker.js")


def on_post_template(output_content, template_name, config):
    """Nothing is taken from the network by the page of a missing page either."""
    return output_content.replace(SHIM, "assets/file_worker.js")
