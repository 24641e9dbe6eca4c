"""Speed reports: result files of the benchmarks as a Markdown table, plots and one self-contained HTML page."""

from gapkernels.benchmark_report.page import Report, render

__all__ = ["Report", "render"]
