"""What `crosslayer VERB` does, verb by verb: each parses, calls and prints."""
