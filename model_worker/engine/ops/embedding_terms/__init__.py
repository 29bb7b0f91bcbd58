"""Rows of a step's embeddings that variants change: functional.py is the contract."""
