"""Decides what a run will do, from scripts, the ledger and table states, without I/O."""
