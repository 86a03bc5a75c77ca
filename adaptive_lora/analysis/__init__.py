"""From trials to a report: statistics, comparison, pages."""
