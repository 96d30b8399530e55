"""Benchmarks of aiomigrate, as ratios to bare LanceDB and to its predecessor's algorithm."""
