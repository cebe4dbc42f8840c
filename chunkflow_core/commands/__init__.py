"""The command line: arguments in, text out. Nothing below parses or prints."""
