"""Products with matrices of variants, dense and sparse: functional.py is the contract."""
