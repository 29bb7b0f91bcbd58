"""Model adapters: how a checkpoint is loaded and spoken to, decided and checked before a weight is read."""

from adapters.chat_format import require_chat_template
from adapters.chat_template import ChatTemplate
from adapters.load_plan import LoadPlan, MemoryEstimate
from adapters.plan import plan_load

__all__ = ["ChatTemplate", "LoadPlan", "MemoryEstimate", "plan_load", "require_chat_template"]
