"""A run, its data and results -> report.html, the model card and result files.

Start with report_data.RunSummary.
"""
