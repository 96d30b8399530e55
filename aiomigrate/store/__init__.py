"""The adapter to LanceDB, and the only package that imports it at run time."""
