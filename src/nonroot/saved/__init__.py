"""Saved domains: the file that holds one, and what is put into it."""
