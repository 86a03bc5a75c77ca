"""Adapter sites: the linear maps of a model that can take a low-rank adapter."""

from adaptive_lora.sites.find import architecture_note, find_sites, warn_of_architecture
from adaptive_lora.sites.roles import TESTED_TYPES, role_of
from adaptive_lora.sites.site import (
    ATTENTION_ROLES,
    FEED_FORWARD_ROLES,
    AdapterSite,
    Placement,
    Role,
    select_sites,
)

__all__ = [
    "ATTENTION_ROLES",
    "FEED_FORWARD_ROLES",
    "TESTED_TYPES",
    "AdapterSite",
    "Placement",
    "Role",
    "architecture_note",
    "find_sites",
    "role_of",
    "select_sites",
    "warn_of_architecture",
]
