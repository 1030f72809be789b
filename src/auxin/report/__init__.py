"""The report of a run: a self-contained HTML page, and pictures of results.

Nothing is imported here: what draws a small picture does not wait for what the page needs.
"""
