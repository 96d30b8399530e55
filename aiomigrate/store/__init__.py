"""The adapter to LanceDB; the only package that imports it at run time."""
