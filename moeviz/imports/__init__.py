"""Routing that other programs recorded, as runs: read, checked line by line, written as if moeviz had watched.

    file -> lines or tables (one module a format) -> Recording -> records -> store

A format that needs more than its file says so: gate weights that were not written are equal shares, and the run
says that too (its `imported` event and `config`).
"""
