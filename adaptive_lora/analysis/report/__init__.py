"""A comparison for people: terminal, Markdown, JSON and one HTML page with figures."""

from adaptive_lora.analysis.report.formats import PAGE, About, render_markdown, render_terminal, write_report
from adaptive_lora.analysis.report.result import ComparisonResult, ComparisonTable

__all__ = ["PAGE", "About", "ComparisonResult", "ComparisonTable", "render_markdown", "render_terminal", "write_report"]
