"""The two metadata tables: their records, format, history, creation, lease and writer."""
