# SPDX-License-Identifier: Apache-2.0
"""The site's copies of the notebooks to which pages of docs/ link.

A page links to `../notebooks/NAME.ipynb`, as the repository has it, and mkdocs
knows docs/ alone. These hooks of mkdocs.yml copy each linked notebook to the
same path below the site's root, and the page links to the copy.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# From a page directly in docs/.
_LINK = re.compile(r'\]\(\.\./([\w./]+\.ipynb)\)')


def on_files(files: Files, config: MkDocsConfig) -> Files:
  root = Path(config.docs_dir).parent
  paths = set()
  for page in files.documentation_pages():
    paths.update(_LINK.findall(page.content_string))
  for path in sorted(paths):
    files.append(File.generated(config, path, abs_src_path=str(root / path)))
  return files


def on_page_markdown(markdown: str, **_: object) -> str:
  return _LINK.sub(r'](\1)', markdown)
