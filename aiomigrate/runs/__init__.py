"""One run under one lease: read, decide, schedule lines, settle the ledger."""
