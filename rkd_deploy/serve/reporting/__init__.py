"""Reports: what was measured as one page that opens anywhere, and as Markdown.

records.py    what a report needs of a bench's record, of whatever version
figures.py    its pictures
sections.py   which pictures and tables, in which order
document.py   pictures and tables as such; Markdown
svg.py        a picture as inline SVG in the page's colours
page.py       one HTML file: nothing is fetched, nothing runs
writing.py    the report of a bench
page.css      what it looks like, on a phone, on a desk, light and dark
"""
