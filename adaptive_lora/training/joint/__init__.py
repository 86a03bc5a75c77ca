"""Training of several trials together on one base."""
