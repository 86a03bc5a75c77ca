"""The planted benchmark: a known answer to the question where rank is needed."""
