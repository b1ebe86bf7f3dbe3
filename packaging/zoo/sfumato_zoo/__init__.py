"""Models of sfumato's zoo that its wheel leaves out; ``sf.load`` finds them by name."""
