"""The shape of a table as values: columns, indexes, SQL and their stored forms. Pure."""
