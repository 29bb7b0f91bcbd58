"""Model adapters: how a checkpoint is loaded and spoken to, decided and checked before a weight is read."""

from adapters.chat_format import require_chat_template
from adapters.plan import plan_load

__all__ = ["plan_load", "require_chat_template"]
