"""Products with weights of 8 or 4 bits on GPUs: functional.py is the contract."""
