"""Trials to a report: statistics, comparison, pages."""
