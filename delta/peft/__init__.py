"""Adapters in the directories that the library PEFT writes, read strictly: docs/formats/peft.md."""
