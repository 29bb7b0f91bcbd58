"""LoRA adapters and other variants while the engine runs: their memory, their states, and who may run when."""
