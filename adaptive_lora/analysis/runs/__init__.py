"""Runs made elsewhere: tables, output of lm-evaluation-harness and MLflow runs become trials that are compared."""
