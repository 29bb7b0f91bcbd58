"""Rows of a step that variants scale and shift: functional.py is the contract."""
