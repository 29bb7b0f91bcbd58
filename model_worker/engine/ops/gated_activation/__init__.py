"""The activation of a gate, times what it lets through: functional.py is the contract."""
