"""Experiments: methods x rates x seeds on one pair of models, with rows, tables and plots. Knows no Lightning."""
