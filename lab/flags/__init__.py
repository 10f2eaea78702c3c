"""The command line: flags that commands share, and suggestions for what was mistyped."""
