"""Drawing tokens on GPUs: functional.py is the contract."""
