"""Reports: one self-contained HTML page about a conversion or a batch.

No network, no fonts, no libraries: inline SVG, a style for light and for dark, and a few lines of
script that search the table. Everything that comes from a checkpoint is text, escaped by jinja2.
"""
