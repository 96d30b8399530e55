"""One migration: apply its operations, record them, recover after a crash, undo."""
