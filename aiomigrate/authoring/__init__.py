"""Helps to write migration scripts: `scaffold` generates new files."""
