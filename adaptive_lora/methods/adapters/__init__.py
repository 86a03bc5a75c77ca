"""Adapters: a plan is built into a PEFT model, audited, saved and exported."""

from adaptive_lora.methods.adapters.attach import attach, detach
from adaptive_lora.methods.adapters.audit import audit_as_built, audit_moved
from adaptive_lora.methods.adapters.export import save_adapter

__all__ = ["attach", "audit_as_built", "audit_moved", "detach", "save_adapter"]
