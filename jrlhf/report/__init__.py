"""What a run came to: a table in the terminal, and one page that needs nothing but itself."""

from jrlhf.report.page import run_report, write_report
from jrlhf.report.table import figures, print_summary

__all__ = ["figures", "print_summary", "run_report", "write_report"]
