"""Adapter sites: the linear maps of a model that can take a low-rank adapter."""

from adaptive_lora.sites.adaptable import unreached_maps
from adaptive_lora.sites.architecture import (
    Architecture,
    Decoder,
    Shape,
    SiteSurvey,
    size,
)
from adaptive_lora.sites.choice import SiteChoice, layers_problem, select_sites
from adaptive_lora.sites.find import (
    find_sites,
    site_notes,
    survey_sites,
    warn_of_sites,
)
from adaptive_lora.sites.read import read_architecture
from adaptive_lora.sites.roles import TESTED_TYPES, role_of
from adaptive_lora.sites.site import (
    ATTENTION_ROLES,
    FEED_FORWARD_ROLES,
    AdapterSite,
    Placement,
    Role,
)

__all__ = [
    "ATTENTION_ROLES",
    "FEED_FORWARD_ROLES",
    "TESTED_TYPES",
    "AdapterSite",
    "Architecture",
    "Decoder",
    "Placement",
    "Role",
    "Shape",
    "SiteChoice",
    "SiteSurvey",
    "find_sites",
    "layers_problem",
    "read_architecture",
    "role_of",
    "select_sites",
    "site_notes",
    "size",
    "survey_sites",
    "unreached_maps",
    "warn_of_sites",
]
