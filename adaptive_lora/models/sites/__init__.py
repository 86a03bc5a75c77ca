"""Adapter sites of a model: the linear layers that can take a low-rank adapter."""

from adaptive_lora.models.sites.adaptable import taken_for_experts, unreached_layers
from adaptive_lora.models.sites.find import find_sites, read_architecture, site_notes, survey_sites, warn_of_sites
from adaptive_lora.models.sites.roles import TESTED_TYPES, role_of

__all__ = [
    "TESTED_TYPES",
    "find_sites",
    "read_architecture",
    "role_of",
    "site_notes",
    "survey_sites",
    "taken_for_experts",
    "unreached_layers",
    "warn_of_sites",
]
