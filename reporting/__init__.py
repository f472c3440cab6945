"""The parts of report.py: reading runs and records, costs of networks, tables, plots, the page."""
