"""What a run will do, decided without I/O from scripts, ledger and table states."""
