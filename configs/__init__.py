"""Configurations. `default.py` documents every key; each other file is a short override of it."""
