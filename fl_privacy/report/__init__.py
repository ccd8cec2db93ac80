"""The report: one self-contained page on what a run gave away, made from its ledger. Needs neither torch nor Flower."""

from fl_privacy.report.history import ClientHistory, RunHistory, read_checked_history, read_history
from fl_privacy.report.page import render_report
from fl_privacy.report.pictures import Picture, find_pictures

__all__ = [
    "ClientHistory",
    "Picture",
    "RunHistory",
    "find_pictures",
    "read_checked_history",
    "read_history",
    "render_report",
]
