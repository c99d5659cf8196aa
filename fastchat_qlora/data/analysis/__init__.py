"""Datasets -> statistics, examples and comparisons with a server.

Start with statistics.compute_statistics and serving_parity.report_parity.
"""
