"""Benchmarks, run as `dslib bench NAME`; each writes a record for the machine it ran on."""
