"""The report of a run: a self-contained HTML page, and a picture of its result."""

from auxin.report.comparison import comparison_findings
from auxin.report.findings import findings
from auxin.report.html import write_report
from auxin.report.markdown import write_markdown
from auxin.report.picture import write_chart_svg

__all__ = ["comparison_findings", "findings", "write_chart_svg", "write_markdown", "write_report"]
