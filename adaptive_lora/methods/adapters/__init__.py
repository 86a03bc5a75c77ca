"""Adapters: a plan becomes a PEFT model and back, and is checked as built."""

from adaptive_lora.methods.adapters.attach import attach, detach
from adaptive_lora.methods.adapters.audit import audit_as_built, audit_moved
from adaptive_lora.methods.adapters.folder import save_adapter

__all__ = ["attach", "audit_as_built", "audit_moved", "detach", "save_adapter"]
