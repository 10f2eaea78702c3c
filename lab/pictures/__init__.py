"""How results are shown: tables in a terminal, pictures by matplotlib, pages of HTML."""
