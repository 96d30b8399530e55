"""One run under one lease: read and plan, take the lease, run migrations, report.

`upgrade`, `downgrade` and `maintenance` are the entry points that the manager calls.
"""
