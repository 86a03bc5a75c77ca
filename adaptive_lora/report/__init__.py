"""A comparison for people: terminal, Markdown, JSON and one HTML page with figures."""

from adaptive_lora.report.page import write_report
from adaptive_lora.report.tables import render_markdown, render_terminal

__all__ = ["render_markdown", "render_terminal", "write_report"]
