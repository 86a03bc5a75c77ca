"""Several trials trained together over one base."""
