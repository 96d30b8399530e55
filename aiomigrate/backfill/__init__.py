"""Fills a column by a user's function: chunks, calls, retries, caching; also on a Ray cluster."""
