"""Timing reports of past runs, as text and as an HTML page."""
