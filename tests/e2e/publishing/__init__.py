"""Deltas published to the real processes. It is a package so that its tests share one fleet (conftest.py)."""
