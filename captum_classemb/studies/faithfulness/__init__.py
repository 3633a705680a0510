"""Faithfulness of attribution methods."""
