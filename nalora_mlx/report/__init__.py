"""The `nalora report` command: an HTML page and PNG plots of one run or several.

A command, so it may import every package. Modules are imported where they are used: plots need the optional packages
matplotlib, plotly and jinja2.
"""
