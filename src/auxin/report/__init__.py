"""The report of a run: a self-contained HTML page, and a picture of its result."""

from auxin.report.findings import findings
from auxin.report.html import write_report
from auxin.report.picture import write_chart_svg

__all__ = ["findings", "write_chart_svg", "write_report"]
