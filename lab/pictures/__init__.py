"""Showing results: tables in a terminal, pictures by matplotlib, pages of HTML."""
