"""How copycat, the bundled model, was trained. README.md in this folder says in which order to read the files."""
