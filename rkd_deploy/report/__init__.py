"""Report: shows a record on a terminal, as Markdown, as pictures and as one HTML page."""
