"""Reports: what was measured as one page that opens anywhere, and as Markdown.

records.py    what a report needs of a bench's record, of whatever version
figures.py    its pictures
sections.py   which pictures and tables, in which order
document.py   pictures and tables as such; Markdown
svg.py        a picture as inline SVG in the page's colours
page.py       one HTML file: nothing is fetched, nothing runs
page.css      what it looks like, on a phone, on a desk, light and dark
"""

from __future__ import annotations

from rkd_deploy.serve.reporting.document import Picture, Section, Table
from rkd_deploy.serve.reporting.page import write_pages
from rkd_deploy.serve.reporting.records import Material, gather, read_records
from rkd_deploy.serve.reporting.sections import sections

__all__ = ["Material", "Picture", "Section", "Table", "gather", "read_records", "sections", "write_pages"]
