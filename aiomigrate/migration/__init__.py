"""Migration scripts: the values users write, how they are loaded, and their checksums."""
