"""A comparison for people: terminal, Markdown, JSON and one HTML page with figures."""

from adaptive_lora.analysis.report.about import About
from adaptive_lora.analysis.report.markdown import render_markdown
from adaptive_lora.analysis.report.terminal import render_terminal
from adaptive_lora.analysis.report.write import write_report

__all__ = ["About", "render_markdown", "render_terminal", "write_report"]
