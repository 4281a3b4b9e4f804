"""Results of a run: a table in the terminal, and one self-contained page."""

from jrlhf.report.page import run_report, write_report
from jrlhf.report.table import figures, print_summary

__all__ = ["figures", "print_summary", "run_report", "write_report"]
